//! What a driver asks for (Virtio 1.3, 5.2.6), read once and checked before anything is touched.

use std::ops::Deref;
use std::sync::atomic::Ordering;

use vmm_memory::vm_memory::GuestMemory;

use super::Shared;
use super::backend::Operation;
use super::buffers::Area;
use super::config::{ID_BYTES, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::Chain;

/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a segment of a discard or write-zeroes request.
const SEGMENT: usize = 16;
/// The `unmap` flag of such a segment.
const UNMAP: u32 = 1;

/// Types (5.2.6).
pub(super) mod kind {
    pub(crate) const IN: u32 = 0;
    pub(crate) const OUT: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

/// How a request ended (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What this driver may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    pub(super) flush: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// What the device can do for this driver now: for the requests of one call.
#[derive(Debug)]
pub(super) struct Terms<'a> {
    shared: &'a Shared,
    agreed: Agreed,
    /// The first byte beyond the disk, once somebody wanted to know.
    end: Option<u64>,
}

impl<'a> Terms<'a> {
    pub(super) fn new(shared: &'a Shared, agreed: Agreed) -> Self {
        Self { shared, agreed, end: None }
    }

    /// Whether the bytes before `end` are those of the disk. A driver may have sent a request that it could not have sent when
    /// this was looked at last: before one fails it is looked at again.
    fn holds(&mut self, end: u64) -> bool {
        if self.end.is_some_and(|known| end <= known) {
            return true;
        }
        let promised = self.shared.sectors.load(Ordering::SeqCst).saturating_mul(SECTOR);
        // The disk is asked, too, so that none goes beyond the end of a file that has become smaller.
        let known = promised.min(self.shared.disk.size().unwrap_or(0));
        self.end = Some(known);
        end <= known
    }

    /// Whether writes end when they are on stable storage. Looked at for each request: the driver may have changed it just before
    /// it sent that one.
    fn durable(&self) -> bool {
        !self.agreed.flush || !self.shared.writeback.load(Ordering::SeqCst)
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Disk(Operation),
    GetId,
    /// Nothing: it is answered at once.
    Fail(Status),
}

/// A request that was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) task: Task,
    /// Its data.
    pub(super) area: Area,
    /// Where in the writable buffers the status goes, their last byte; `None` if there is none.
    pub(super) status_at: Option<u64>,
    pub(super) activity: Activity,
    /// Bytes that rate limits count.
    pub(super) cost: u64,
    /// The first byte of the disk behind those that it names; 0 if it names none.
    end: u64,
}

impl Request {
    pub(super) fn read<T: Deref<Target: GuestMemory>>(chain: &Chain<T>, terms: &mut Terms<'_>) -> Self {
        let status_at = chain.writable_len().checked_sub(1);
        let mut request = Self {
            task: Task::Fail(Status::IoError),
            area: Area::None,
            status_at,
            activity: Activity::Other,
            cost: 0,
            end: 0,
        };
        let mut header = [0; HEADER];
        // Without a place for the status nothing is done that the driver could not learn of.
        if status_at.is_none() || !chain.read(0, &mut header).is_ok_and(|read| read == HEADER) {
            return request;
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
        if let Err(status) = request.fill(chain, kind, sector, terms) {
            (request.task, request.area, request.cost) = (Task::Fail(status), Area::None, 0);
        }
        request
    }

    fn fill<T: Deref<Target: GuestMemory>>(
        &mut self,
        chain: &Chain<T>,
        kind: u32,
        sector: u64,
        terms: &mut Terms<'_>,
    ) -> Result<(), Status> {
        let to_read = chain.readable_len().saturating_sub(HEADER as u64);
        let to_write = self.status_at.unwrap_or(0);
        let size = |len: u64| usize::try_from(len).map_err(|_| Status::IoError);
        self.task = match kind {
            kind::IN => {
                self.activity = Activity::Read;
                let offset = self.range(sector, to_write, terms)?;
                (self.area, self.cost) = (Area::Writable { len: size(to_write)? }, to_write);
                Task::Disk(Operation::Read { offset })
            }
            kind::OUT => {
                self.activity = Activity::Write;
                writable(terms)?;
                let offset = self.range(sector, to_read, terms)?;
                (self.area, self.cost) = (Area::Readable { at: HEADER as u64, len: size(to_read)? }, to_read);
                Task::Disk(Operation::Write { offset, durable: terms.durable() })
            }
            kind::FLUSH => Task::Disk(Operation::Flush),
            kind::GET_ID if to_write >= ID_BYTES as u64 => Task::GetId,
            kind::GET_ID => return Err(Status::IoError),
            kind::DISCARD if terms.agreed.discard => {
                writable(terms)?;
                let segment = Segment::read(chain, to_read)?;
                if segment.flags != 0 {
                    return Err(Status::Unsupported);
                }
                let len = segment.len(MAX_DISCARD_SECTORS)?;
                let offset = self.range(segment.sector, len, terms)?;
                Task::Disk(Operation::Discard { offset, len })
            }
            kind::WRITE_ZEROES if terms.agreed.write_zeroes => {
                self.activity = Activity::Write;
                writable(terms)?;
                let segment = Segment::read(chain, to_read)?;
                if segment.flags & !UNMAP != 0 {
                    return Err(Status::Unsupported);
                }
                let len = segment.len(MAX_WRITE_ZEROES_SECTORS)?;
                let offset = self.range(segment.sector, len, terms)?;
                self.cost = len;
                let unmap = segment.flags & UNMAP != 0;
                Task::Disk(Operation::WriteZeroes { offset, len, unmap, durable: terms.durable() })
            }
            _ => return Err(Status::Unsupported),
        };
        Ok(())
    }

    /// Where `len` bytes from `sector` on begin, if those are sectors of the disk.
    fn range(&mut self, sector: u64, len: u64, terms: &mut Terms<'_>) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        self.end = offset.checked_add(len).ok_or(Status::IoError)?;
        if len.is_multiple_of(SECTOR) && terms.holds(self.end) { Ok(offset) } else { Err(Status::IoError) }
    }

    /// The same, which fails if the disk has meanwhile become too small for it.
    pub(super) fn within(self, terms: &mut Terms<'_>) -> Self {
        if terms.holds(self.end) {
            return self;
        }
        Self { task: Task::Fail(Status::IoError), area: Area::None, ..self }
    }

    /// How long it keeps others waiting, in bytes that are moved meanwhile: each has its price, and that of one that goes to a disk without
    /// data is guessed.
    pub(super) fn effort(&self) -> u64 {
        const EACH: u64 = 32 << 10;
        const WITHOUT_DATA: u64 = 1 << 20;
        match self.task {
            Task::Disk(Operation::Flush | Operation::Discard { .. }) => WITHOUT_DATA,
            _ => self.cost.max(EACH),
        }
    }

    /// What the used ring says: bytes that were written from the first writable one on, without a gap (2.7.8). Where the
    /// status is not behind data that was written, that is nothing.
    pub(super) fn written(&self, status: Status) -> u64 {
        let data = match (status, self.task, self.area) {
            (Status::Ok, Task::GetId, _) => ID_BYTES as u64,
            (Status::Ok, _, Area::Writable { len }) => len as u64,
            _ => 0,
        };
        if self.status_at == Some(data) { data + 1 } else { data }
    }

    /// Bytes of data that it moved, for whoever counts: all of its buffers, or none if it failed.
    pub(super) fn moved(&self, status: Status) -> u64 {
        if status == Status::Ok { self.area.len() as u64 } else { 0 }
    }
}

/// One segment of a discard or write-zeroes request.
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Segment {
    fn read<T: Deref<Target: GuestMemory>>(chain: &Chain<T>, len: u64) -> Result<Self, Status> {
        let mut bytes = [0; SEGMENT];
        // One segment is what the configuration allows.
        if len != SEGMENT as u64 || !chain.read(HEADER as u64, &mut bytes).is_ok_and(|read| read == SEGMENT) {
            return Err(Status::IoError);
        }
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        Ok(Self {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        })
    }

    /// How many bytes it names.
    fn len(&self, max_sectors: u32) -> Result<u64, Status> {
        if self.sectors > max_sectors {
            return Err(Status::IoError);
        }
        Ok(u64::from(self.sectors) * SECTOR)
    }
}

fn writable(terms: &Terms<'_>) -> Result<(), Status> {
    if terms.shared.read_only { Err(Status::IoError) } else { Ok(()) }
}
