//! Random requests against a disk that is a `Vec`.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
struct Step {
    kind: u32,
    sector: u64,
    /// Lengths of the data buffers.
    pieces: Vec<u32>,
    /// Where the data begins.
    at: u64,
    fill: u8,
    flags: u32,
    sectors: u32,
    /// How the header is cut.
    cut: u32,
    indirect: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        4 => Just(kind::IN),
        4 => Just(kind::OUT),
        1 => Just(kind::FLUSH),
        1 => Just(kind::GET_ID),
        2 => Just(kind::DISCARD),
        2 => Just(kind::WRITE_ZEROES),
        1 => any::<u32>(),
    ];
    let sector = prop_oneof![8 => 0..SECTORS as u64 + 2, 1 => any::<u64>()];
    let piece = prop_oneof![3 => Just(512u32), 1 => 0u32..1200, 1 => (1u32..4).prop_map(|n| n * 512)];
    let at = prop_oneof![3 => DATA..0x1f000, 2 => 0x1f000u64..0x20100, 1 => Just(NOWHERE - 700)];
    let rest = (any::<u8>(), prop_oneof![4 => 0u32..2, 1 => any::<u32>()], 0u32..80, 0u32..18, any::<bool>());
    (kind, sector, prop::collection::vec(piece, 0..5), at, rest).prop_map(
        |(kind, sector, pieces, at, (fill, flags, sectors, cut, indirect))| Step {
            kind,
            sector,
            pieces,
            at,
            fill,
            flags,
            sectors,
            cut,
            indirect,
        },
    )
}

const RAM: u64 = 0x10_0000;

/// What the specification wants: the status, and what the data is afterwards.
fn expected(step: &Step, disk: &mut [u8]) -> (u8, Option<Vec<u8>>) {
    let len: usize = step.pieces.iter().map(|piece| *piece as usize).sum();
    let in_ram = len == 0 || step.at + len as u64 <= RAM;
    let range = |sector: u64, len: usize| {
        let start = usize::try_from(sector.checked_mul(512)?).ok()?;
        let range = start..start.checked_add(len)?;
        (range.end <= SECTORS * 512 && len.is_multiple_of(512)).then_some(range)
    };
    if step.cut > 16 {
        // The header ends early.
        return (IO_ERROR, None);
    }
    match step.kind {
        kind::IN => match range(step.sector, len) {
            Some(range) if in_ram => (OK, Some(disk[range].to_vec())),
            _ => (IO_ERROR, None),
        },
        kind::OUT => match range(step.sector, len) {
            Some(range) if in_ram => {
                disk[range].fill(step.fill);
                (OK, None)
            }
            _ => (IO_ERROR, None),
        },
        kind::FLUSH => (OK, None),
        kind::GET_ID if len >= 20 && (step.at + 20 <= RAM) => (OK, Some(vec![0; 20])),
        kind::GET_ID => (IO_ERROR, None),
        kind::DISCARD | kind::WRITE_ZEROES => {
            let allowed = if step.kind == kind::DISCARD { 0 } else { 1 };
            if step.flags & !allowed != 0 {
                return (UNSUPPORTED, None);
            }
            match range(step.sector, step.sectors as usize * 512) {
                Some(range) => {
                    disk[range].fill(0);
                    (OK, None)
                }
                None => (IO_ERROR, None),
            }
        }
        _ => (UNSUPPORTED, None),
    }
}

fn perform(rig: &mut Rig, step: &Step) -> (u8, u32) {
    rig.put_header(step.kind, step.sector);
    rig.put(STATUS, &[POISON]);
    let (first, second) = (step.cut.min(16), 16 - step.cut.min(16));
    let first = if step.cut > 16 { 10 } else { first };
    let mut chain = rig.queue.chain().readable(HEADER, first);
    if second > 0 {
        chain = chain.readable(HEADER + u64::from(first), second);
    }
    let mut at = step.at;
    for piece in &step.pieces {
        let written = matches!(step.kind, kind::IN | kind::GET_ID);
        chain = match step.kind {
            kind::DISCARD | kind::WRITE_ZEROES => break,
            _ if written => chain.writable(at, *piece),
            _ if step.cut > 16 => break,
            _ => chain.readable(at, *piece),
        };
        at += u64::from(*piece);
    }
    if matches!(step.kind, kind::DISCARD | kind::WRITE_ZEROES) && step.cut <= 16 {
        chain = chain.readable(0x7000, 16);
    }
    let chain = chain.writable(STATUS, 1);
    let head = if step.indirect { chain.submit_indirect(0xf000) } else { chain.submit() }.unwrap();
    rig.ended(head)
}

fn check(mut rig: Rig, steps: Vec<Step>) {
    let mut disk = vec![0; SECTORS * 512];
    for step in steps {
        let len: usize = step.pieces.iter().map(|piece| *piece as usize).sum();
        let there = len.min(usize::try_from(RAM.saturating_sub(step.at)).unwrap());
        rig.put(step.at.min(RAM - 1), &vec![step.fill; there.max(1)]);
        rig.put(0x7000, &segment(step.sector, step.sectors, step.flags));
        let (status, data) = expected(&step, &mut disk);
        let (got, used) = perform(&mut rig, &step);
        assert_eq!(got, status, "{step:?}");
        let room = if matches!(step.kind, kind::IN | kind::GET_ID) { len } else { 0 };
        let written = data.as_ref().map_or(0, Vec::len);
        let expected_used = written + usize::from(written == room);
        assert_eq!(used as usize, expected_used, "{step:?}");
        if let Some(data) = data {
            assert_eq!(rig.get(step.at, data.len()), data, "{step:?}");
        } else if there > 0 {
            assert_eq!(rig.get(step.at, there), vec![step.fill; there], "{step:?}");
        }
    }
    assert_eq!(rig.read(0, SECTORS * 512), disk);
    assert_eq!(rig.driver.status() & 0x40, 0);
}

fn file() -> RawFile {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS as u64 * 512).unwrap();
    RawFile::new(file, false).unwrap()
}

fn patient(disk: Arc<dyn ConcurrentDisk>) -> Rig {
    Rig { patient: true, ..Rig::new(Block::concurrent(disk), ALL) }
}

proptest! {
    #[test]
    fn a_disk_is_a_vec(steps in prop::collection::vec(step(), 1..40), short in prop::option::of(1usize..1500)) {
        let (rig, probe) = probed(ALL);
        probe.shorten(short);
        check(rig, steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn so_is_a_file(steps in prop::collection::vec(step(), 1..40)) {
        check(Rig::new(Block::builder(Arc::new(file())), ALL), steps);
    }

    #[test]
    fn so_is_one_that_threads_serve(steps in prop::collection::vec(step(), 1..40), short in prop::option::of(1usize..1500)) {
        let pool = ThreadPool::new(std::num::NonZeroUsize::MIN).unwrap();
        let probe = faulty(SECTORS as u64 * 512);
        probe.shorten(short);
        check(patient(Arc::new(Pooled::new(probe, pool))), steps);
    }

    #[cfg(feature = "io-uring")]
    #[test]
    fn so_is_one_that_the_kernel_serves(steps in prop::collection::vec(step(), 1..40), forbidden: bool) {
        let pool = ThreadPool::new(std::num::NonZeroUsize::MIN).unwrap();
        let disk = UringFile::new(file(), pool);
        check(patient(Arc::new(if forbidden { disk.forbidden() } else { disk })), steps);
    }
}
