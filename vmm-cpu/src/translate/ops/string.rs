//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, with and without REP.
//!
//! They work in pieces: whole runs of elements within one page where the TLB has it, else one element by ordinary
//! accesses, which fault, reach devices and fill the TLB. Registers are moved on after each piece, so they always say
//! what is left. A REP starts itself anew whenever what is left is whole pages, for the run loop to look at interrupts: so
//! how often it counts as an instruction does not depend on what the TLB has. It also lets the loop look after a piece that
//! reached a device or changed code, which does not count.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::by_width;
use super::op::{Handler, Op, implicit_segment};
use crate::translate::core::{Flow, Machine, Place, Reason};
use crate::translate::cpu::{BLOCK, RAX, RCX, RDI, RDX, RSI};
use crate::translate::flags::{Flags, bits};
use crate::translate::memory::{Access, HostWord, Order, PAGE, PAGE_MASK};
use crate::translate::segment::{index, low16};
use crate::translate::word::Word;

/// Bytes that are copied at once.
const COPIED: usize = 512;
/// Bytes that are compared at once: fewer, since the first may decide.
const COMPARED: usize = 256;
/// Bytes that a port moves at once: a page.
const PORTED: usize = 4096;
/// What a piece costs besides its bytes, in bytes.
const PIECE_COST: u64 = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    /// REP, REPE.
    WhileEqual,
    /// REPNE.
    WhileNotEqual,
}

/// What an instruction's prefixes and the direction flag say.
#[derive(Clone, Copy)]
struct Form {
    repeat: Repeat,
    /// What of RSI, RDI and RCX counts.
    mask: u64,
    /// Segment of the source.
    segment: usize,
    backward: bool,
}

impl Form {
    fn of(m: &Machine<'_>, op: &Op) -> Self {
        let instruction = m.rare(op);
        let repeat = if instruction.has_repne_prefix() {
            Repeat::WhileNotEqual
        } else if instruction.has_rep_prefix() {
            Repeat::WhileEqual
        } else {
            Repeat::Once
        };
        let mask = (0..instruction.op_count())
            .find_map(|n| match instruction.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(0xffff),
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(0xffff_ffff),
                _ => None,
            })
            .unwrap_or(u64::MAX);
        let segment = implicit_segment(&instruction, m.is_64());
        Self { repeat, mask, segment, backward: m.cpu.flags.control(bits::DF) }
    }

    /// The part of a register that counts.
    fn get(&self, m: &Machine<'_>, register: u8) -> u64 {
        m.cpu.r(register) & self.mask
    }

    /// Writes that part; 32-bit ones clear the upper half.
    fn set(&self, m: &mut Machine<'_>, register: u8, value: u64) {
        let kept = if self.mask == 0xffff { m.cpu.r(register) & !0xffff } else { 0 };
        m.cpu.set_r(register, kept | value & self.mask);
    }

    /// The order in which other vCPUs see the elements accessed.
    fn order(&self) -> Order {
        Order::backward(self.backward)
    }

    /// Moves an index register on.
    fn advance<W: Word>(&self, m: &mut Machine<'_>, register: u8, elements: u64) {
        let bytes = elements * W::BYTES as u64;
        let old = m.cpu.r(register);
        let new = if self.backward { old.wrapping_sub(bytes) } else { old.wrapping_add(bytes) };
        self.set(m, register, new);
    }

    /// Whether a comparison with that result is the last.
    fn ends(&self, equal: bool) -> bool {
        match self.repeat {
            Repeat::Once => true,
            Repeat::WhileEqual => !equal,
            Repeat::WhileNotEqual => equal,
        }
    }

    /// Lowest address of the `elements` elements that follow the first `done` ones of a run.
    fn lowest<W: Word>(&self, run: Place, done: u64, elements: u64) -> u64 {
        let bytes = W::BYTES as u64;
        if self.backward {
            run.va.wrapping_sub((done + elements).saturating_sub(1) * bytes)
        } else {
            run.va.wrapping_add(done * bytes)
        }
    }

    /// How many of `count` elements from `offset` on lie at offsets 0 to `last`; none if the first does not.
    fn within<W: Word>(&self, offset: u64, last: u64, count: u64) -> u64 {
        let bytes = W::BYTES as u64;
        if last - offset < bytes - 1 {
            0
        } else if self.backward {
            count.min(offset / bytes + 1)
        } else {
            count.min((last - offset - (bytes - 1)) / bytes + 1)
        }
    }

    /// Where the elements at an index register begin, and how many of `count` can be treated alike: those of one page,
    /// where one check of the segment does for all. Zero means that the first is not such an element.
    fn run<W: Word>(
        &self,
        m: &mut Machine<'_>,
        segment: usize,
        register: u8,
        write: bool,
        count: u64,
    ) -> Flow<(Place, u64)> {
        let offset = self.get(m, register);
        let place = m.place_in(segment, offset, W::BYTES, write)?;
        let mut count = self.within::<W>(place.va & !PAGE_MASK, PAGE - 1, count);
        if !m.is_64() || self.mask != u64::MAX {
            count = self.within::<W>(offset, self.mask, count);
        }
        if !m.is_64() && count > 1 {
            let below = (count - 1) * W::BYTES as u64;
            let first = if self.backward { offset - below } else { offset };
            let last = first + below + W::BYTES as u64 - 1;
            if !m.cpu.segment(segment).contains(first, last) {
                count = 0;
            }
        }
        Ok((place, count))
    }
}

/// A part of the work that went through without a fault.
struct Piece {
    elements: u64,
    /// A comparison ended the repetition.
    ended: bool,
}

impl Piece {
    fn of(elements: u64) -> Flow<Self> {
        Ok(Self { elements, ended: false })
    }
}

/// Does pieces of at most the given number of elements until all are done or it is time for a break.
#[inline(always)]
fn repeat<W: Word>(
    m: &mut Machine<'_>,
    op: &Op,
    mut piece: impl FnMut(&mut Machine<'_>, &Form, u64) -> Flow<Piece>,
) -> Flow {
    let form = Form::of(m, op);
    if form.repeat == Repeat::Once {
        return piece(m, &form, 1).map(|_| ());
    }
    let mut left = form.get(m, RCX);
    if left == 0 {
        return Ok(());
    }
    let stepping = m.cpu.flags.control(bits::TF) || m.debug.single_step;
    let unit = PAGE / W::BYTES as u64;
    let mut ahead = (left - 1) % unit + 1;
    loop {
        let done = piece(m, &form, if stepping { 1 } else { ahead })?;
        left -= done.elements;
        ahead -= done.elements;
        form.set(m, RCX, left);
        if left == 0 || done.ended {
            return Ok(());
        }
        let cost = done.elements * W::BYTES as u64 + PIECE_COST;
        // Time goes on meanwhile: the loop looks at it sooner.
        m.budget -= (cost / PIECE_COST).cast_signed();
        if stepping || ahead == 0 || m.watch_hits != 0 {
            break;
        }
        if m.limit == 0 {
            return Err(m.leave(Reason::None));
        }
    }
    if stepping {
        // RF is for the whole instruction, which goes on.
        m.keeps_rf = true;
    }
    let start = m.cpu.r(BLOCK).wrapping_add(u64::from(op.start));
    m.cpu.rip = start & m.mode.ip_mask;
    Ok(())
}

/// The bytes of a number of elements, which fit in a page.
fn bytes_of<W: Word>(elements: u64) -> usize {
    usize::try_from(elements).unwrap_or(0).saturating_mul(W::BYTES)
}

/// Copies elements of RAM as far as the TLB has it; how many. The outcome is that of one element after the other.
fn copy<W: HostWord>(m: &Machine<'_>, form: &Form, source: Place, destination: Place, elements: u64) -> u64 {
    // One page can be at two addresses.
    let places = m.tlb.host_address(source.va, false).zip(m.tlb.host_address(destination.va, true));
    let Some((from, to)) = places else { return 0 };
    let distance = if form.backward { from.wrapping_sub(to) } else { to.wrapping_sub(from) };
    // Elements that are stored before they are loaded must be seen: no more is copied at once than lies in between.
    let apart = if distance == 0 { u64::MAX } else { distance };
    let at_once = apart.min(COPIED as u64) / W::BYTES as u64;
    let mut done = 0;
    if at_once < 2 {
        while done < elements {
            let Some(value) = m.tlb.load::<W>(form.lowest::<W>(source, done, 1)) else { break };
            if !m.tlb.store(form.lowest::<W>(destination, done, 1), value) {
                break;
            }
            done += 1;
        }
        return done;
    }
    let mut buffer = [0; COPIED];
    while done < elements {
        let count = at_once.min(elements - done);
        let Some(block) = buffer.get_mut(..bytes_of::<W>(count)) else { break };
        if !m.tlb.load_bytes(form.lowest::<W>(source, done, count), block, form.order())
            || !m.tlb.store_bytes(form.lowest::<W>(destination, done, count), block, form.order())
        {
            break;
        }
        done += count;
    }
    done
}

/// The run at RDI, which is looked at when the first element at RSI has been read: if both fault, that one does.
#[inline(always)]
fn second_run<W: HostWord>(
    m: &mut Machine<'_>,
    form: &Form,
    first: Place,
    write: bool,
    count: u64,
) -> Flow<(Place, u64)> {
    form.run::<W>(m, index::ES, RDI, write, count).or_else(|leave| {
        let reason = std::mem::take(&mut m.reason);
        m.require_aligned(first, W::BYTES)?;
        m.translate(first, Access::Read)?;
        let here = PAGE - (first.va & !PAGE_MASK);
        if here < W::BYTES as u64 {
            m.translate(first.plus(here), Access::Read)?;
        }
        m.reason = reason;
        Err(leave)
    })
}

fn movs<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    repeat::<W>(m, op, |m, form, count| {
        let (source, count) = form.run::<W>(m, form.segment, RSI, false, count)?;
        let (destination, count) = second_run::<W>(m, form, source, true, count)?;
        let mut done = if count > 1 { copy::<W>(m, form, source, destination, count) } else { 0 };
        if done == 0 {
            let value = m.load::<W>(source)?;
            m.store(destination, value)?;
            done = 1;
        }
        form.advance::<W>(m, RSI, done);
        form.advance::<W>(m, RDI, done);
        Piece::of(done)
    })
}

/// Fills elements of RAM as far as the TLB has it; how many.
fn fill<W: HostWord>(m: &Machine<'_>, form: &Form, run: Place, elements: u64, value: u64) -> u64 {
    let at_once = elements.min((COPIED / W::BYTES) as u64);
    let mut buffer = [0; COPIED];
    let Some(pattern) = buffer.get_mut(..bytes_of::<W>(at_once)) else { return 0 };
    for element in pattern.chunks_exact_mut(W::BYTES) {
        for (byte, value) in element.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }
    let mut done = 0;
    while done < elements {
        let count = at_once.min(elements - done);
        let Some(block) = pattern.get(..bytes_of::<W>(count)) else { break };
        if !m.tlb.store_bytes(form.lowest::<W>(run, done, count), block, form.order()) {
            break;
        }
        done += count;
    }
    done
}

fn stos<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    repeat::<W>(m, op, |m, form, count| {
        let (place, count) = form.run::<W>(m, index::ES, RDI, true, count)?;
        let value = m.cpu.get::<W>(RAX);
        let mut done = if count > 1 { fill::<W>(m, form, place, count, value) } else { 0 };
        if done == 0 {
            m.store(place, W::truncate(value))?;
            done = 1;
        }
        form.advance::<W>(m, RDI, done);
        Piece::of(done)
    })
}

fn lods<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    repeat::<W>(m, op, |m, form, count| {
        let (place, _) = form.run::<W>(m, form.segment, RSI, false, count)?;
        let value = m.load::<W>(place)?.extend();
        m.cpu.set::<W>(RAX, value);
        form.advance::<W>(m, RSI, 1);
        Piece::of(1)
    })
}

/// The flags of CMP.
fn set_difference<W: Word>(flags: &mut Flags, a: u64, b: u64) {
    let result = a.wrapping_sub(b) & W::MASK;
    flags.set_result::<W>(result, !a & b | (!a | b) & result);
}

/// Compares pairs, the lowest addresses first, up to one that ends the repetition.
#[inline(always)]
fn compare<W: Word>(
    m: &mut Machine<'_>,
    form: &Form,
    mut pairs: impl DoubleEndedIterator<Item = (u64, u64)>,
) -> Piece {
    let mut piece = Piece { elements: 0, ended: false };
    let mut last = (0, 0);
    while let Some((a, b)) = if form.backward { pairs.next_back() } else { pairs.next() } {
        last = (a, b);
        piece.elements += 1;
        if form.ends(a == b) {
            piece.ended = true;
            break;
        }
    }
    set_difference::<W>(&mut m.cpu.flags, last.0, last.1);
    piece
}

/// The elements in `bytes`.
#[inline(always)]
fn elements<W: Word>(bytes: &[u8]) -> impl DoubleEndedIterator<Item = u64> + ExactSizeIterator {
    bytes
        .chunks_exact(W::BYTES)
        .map(|element| element.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Reads elements to compare if the TLB has them and they are more than one.
fn load_run<'b, W: Word>(
    m: &Machine<'_>,
    form: &Form,
    run: Place,
    elements: u64,
    buffer: &'b mut [u8; COMPARED],
) -> Option<&'b [u8]> {
    let block = buffer.get_mut(..bytes_of::<W>(elements))?;
    (elements > 1 && m.tlb.load_bytes(form.lowest::<W>(run, 0, elements), block, form.order()))
        .then_some(block)
}

fn scas<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    repeat::<W>(m, op, |m, form, count| {
        let (place, count) = form.run::<W>(m, index::ES, RDI, false, count)?;
        let count = count.min((COMPARED / W::BYTES) as u64);
        let wanted = m.cpu.get::<W>(RAX);
        let mut buffer = [0; COMPARED];
        let piece = if let Some(block) = load_run::<W>(m, form, place, count, &mut buffer) {
            compare::<W>(m, form, elements::<W>(block).map(|element| (wanted, element)))
        } else {
            let element = m.load::<W>(place)?.extend();
            compare::<W>(m, form, std::iter::once((wanted, element)))
        };
        form.advance::<W>(m, RDI, piece.elements);
        Ok(piece)
    })
}

fn cmps<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    repeat::<W>(m, op, |m, form, count| {
        let (first, count) = form.run::<W>(m, form.segment, RSI, false, count)?;
        let (second, count) = second_run::<W>(m, form, first, false, count)?;
        let count = count.min((COMPARED / W::BYTES) as u64);
        let mut buffers = ([0; COMPARED], [0; COMPARED]);
        let blocks = load_run::<W>(m, form, first, count, &mut buffers.0).zip(load_run::<W>(
            m,
            form,
            second,
            count,
            &mut buffers.1,
        ));
        let piece = if let Some((a, b)) = blocks {
            compare::<W>(m, form, elements::<W>(a).zip(elements::<W>(b)))
        } else {
            let a = m.load::<W>(first)?.extend();
            let b = m.load::<W>(second)?.extend();
            compare::<W>(m, form, std::iter::once((a, b)))
        };
        form.advance::<W>(m, RSI, piece.elements);
        form.advance::<W>(m, RDI, piece.elements);
        Ok(piece)
    })
}

/// Whether a page is memory for that access, and nobody watches which part of it is accessed.
fn is_ram(m: &mut Machine<'_>, place: Place, access: Access) -> Flow<bool> {
    let gpa = m.translate(place, access)?.gpa;
    let slot_allows = m.map().slot(gpa).is_some_and(|slot| access == Access::Read || slot.is_writable());
    Ok(slot_allows && !m.watching && !m.apic_page(gpa))
}

fn ins<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let port = low16(m.cpu.r(RDX));
    // Also where nothing is left to do.
    m.check_port(port, W::BYTES)?;
    repeat::<W>(m, op, |m, form, count| {
        let (place, count) = form.run::<W>(m, index::ES, RDI, true, count)?;
        // What was read from a port must have a place to go.
        let at_once = count > 1 && !form.backward && is_ram(m, place, Access::Write)?;
        let done = if at_once { count } else { 1 };
        m.probe_write(place, done * W::BYTES as u64)?;
        let mut buffer = [0; PORTED];
        let data = buffer.get_mut(..bytes_of::<W>(done)).unwrap_or_default();
        m.port_read(port, W::BYTES, data);
        m.write(place, data)?;
        form.advance::<W>(m, RDI, done);
        Piece::of(done)
    })
}

fn outs<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let port = low16(m.cpu.r(RDX));
    // Also where nothing is left to do.
    m.check_port(port, W::BYTES)?;
    repeat::<W>(m, op, |m, form, count| {
        let (place, count) = form.run::<W>(m, form.segment, RSI, false, count)?;
        let at_once = count > 1 && !form.backward && is_ram(m, place, Access::Read)?;
        let done = if at_once { count } else { 1 };
        let mut buffer = [0; PORTED];
        let data = buffer.get_mut(..bytes_of::<W>(done)).unwrap_or_default();
        m.read(place, data)?;
        m.port_write(port, W::BYTES, data);
        form.advance::<W>(m, RSI, done);
        Piece::of(done)
    })
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Code as C;
    // By code, since two SSE instructions share mnemonics.
    let bytes = match instruction.code() {
        C::Movsb_m8_m8 | C::Cmpsb_m8_m8 | C::Stosb_m8_AL | C::Lodsb_AL_m8 | C::Scasb_AL_m8 => 1,
        C::Movsw_m16_m16 | C::Cmpsw_m16_m16 | C::Stosw_m16_AX | C::Lodsw_AX_m16 | C::Scasw_AX_m16 => 2,
        C::Movsd_m32_m32 | C::Cmpsd_m32_m32 | C::Stosd_m32_EAX | C::Lodsd_EAX_m32 | C::Scasd_EAX_m32 => 4,
        C::Movsq_m64_m64 | C::Cmpsq_m64_m64 | C::Stosq_m64_RAX | C::Lodsq_RAX_m64 | C::Scasq_RAX_m64 => 8,
        C::Insb_m8_DX => return Some((ins::<u8>, true)),
        C::Insw_m16_DX => return Some((ins::<u16>, true)),
        C::Insd_m32_DX => return Some((ins::<u32>, true)),
        C::Outsb_DX_m8 => return Some((outs::<u8>, true)),
        C::Outsw_DX_m16 => return Some((outs::<u16>, true)),
        C::Outsd_DX_m32 => return Some((outs::<u32>, true)),
        _ => return None,
    };
    let run = match instruction.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => by_width!(bytes, movs),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => by_width!(bytes, cmps),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => by_width!(bytes, stos),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => by_width!(bytes, lods),
        _ => by_width!(bytes, scas),
    };
    Some((run, instruction.has_rep_prefix() || instruction.has_repne_prefix()))
}

#[cfg(test)]
mod tests;
