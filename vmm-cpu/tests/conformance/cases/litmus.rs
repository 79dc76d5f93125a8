//! Litmus tests of the memory model of x86, x86-TSO: what one vCPU stores, others see in that order, all of them in the
//! same; and no load passes a fence. With accesses within a cache line and with ones that cross into another page, whose
//! two halves count as accesses of their own.

use std::time::{Duration, Instant};

use iced_x86::code_asm::{AsmMemoryOperand, eax, edx, esi, qword_ptr, rax, rcx, rdi, rdx};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::layout;
use crate::suite::program::{Image, Program};

use super::ordering::{FOUND, PROGRESS, rounds, run_all};

cases![
    stores_are_seen_in_order,
    loads_do_not_see_what_depends_on_them,
    all_see_stores_in_the_same_order,
    loads_do_not_pass_fences,
    loads_do_not_pass_locked_stores,
    loads_do_not_pass_locked_stores_across_pages,
    string_stores_are_whole_words_and_in_order_downwards,
];

/// Rounds at a time. vCPUs that share a processor do few of them in a second.
const ROUNDS: u32 = 100;
/// Longest that batches begin.
const TIME: Duration = Duration::from_millis(150);

/// The two words that a test is about.
#[derive(Clone, Copy)]
struct Words {
    x: u64,
    y: u64,
}

impl Words {
    fn x(self) -> AsmMemoryOperand {
        qword_ptr(self.x)
    }

    fn y(self) -> AsmMemoryOperand {
        qword_ptr(self.y)
    }
}

const WITHIN: Words = Words { x: layout::DATA, y: layout::DATA + 64 };
const ACROSS: Words = Words { x: layout::DATA + 0x1_0ffc, y: layout::DATA + 0x1_2ffc };

/// What a vCPU does in a round: RDI, both halves of which are the number of the round, is what it stores; what it loads
/// to RAX and RDX is looked at. RCX stays.
type Body<'a> = &'a dyn Fn(&mut Program, Words) -> Outcome;

/// One of the two values that a vCPU has loaded.
#[derive(Clone, Copy)]
struct Seen {
    value: u64,
    round: u64,
}

impl Seen {
    /// Whether the low and the high half are those of the round.
    fn halves(self) -> [bool; 2] {
        [self.value & 0xffff_ffff, self.value >> 32].map(|half| half == self.round)
    }

    fn any_new(self) -> bool {
        self.halves().contains(&true)
    }

    fn any_old(self) -> bool {
        self.halves().contains(&false)
    }
}

/// Where a vCPU's results are.
fn results(vcpu: u64) -> u64 {
    FOUND + vcpu * 0x1000
}

fn image(vcpu: u64, vcpus: u64, words: Words, body: Body<'_>) -> Outcome<Image> {
    rounds(vcpu, ROUNDS, |p| {
        p.mov(rdi, rcx)?;
        p.shl(rdi, 32)?;
        p.or(rdi, rcx)?;
        p.xor(eax, eax)?;
        p.xor(edx, edx)?;
        p.mov(qword_ptr(PROGRESS + vcpu * 64), rcx)?;
        for other in (0..vcpus).filter(|other| *other != vcpu) {
            let again = p.here()?;
            let mut there = p.create_label();
            p.cmp(qword_ptr(PROGRESS + other * 64), rcx)?;
            p.jae(there)?;
            p.pause()?;
            p.jmp(again)?;
            p.set_label(&mut there)?;
            // Of its own, as labels want.
            p.nop()?;
        }
        body(p, words)?;
        p.mov(esi, u32::try_from(results(vcpu))?)?;
        p.shl(rcx, 4)?;
        p.mov(qword_ptr(iced_x86::code_asm::rsi + rcx), rax)?;
        p.mov(qword_ptr(iced_x86::code_asm::rsi + rcx + 8), rdx)?;
        p.shr(rcx, 4)?;
        Ok(())
    })
}

/// Runs the bodies, each on a vCPU, for a while; `forbidden` says of what they have seen in a round, RAX and RDX of each,
/// whether no processor lets that happen.
fn litmus(
    backend: &Backend,
    words: Words,
    bodies: &[Body<'_>],
    forbidden: impl Fn(&[[Seen; 2]]) -> bool,
) -> Outcome {
    let vcpus = bodies.len() as u64;
    let images = (0..).zip(bodies).map(|(vcpu, body)| image(vcpu, vcpus, words, *body));
    let images = images.collect::<Outcome<Vec<_>>>()?;
    let start = Instant::now();
    for batch in (0..).take_while(|batch| *batch == 0 || start.elapsed() < TIME) {
        let ram = run_all(backend, &images)?;
        for round in 1..=u64::from(ROUNDS) {
            let load = |vcpu: u64, n: u64| -> Outcome<Seen> {
                let value = ram.memory().read_obj(GuestAddress(results(vcpu) + round * 16 + n * 8))?;
                Ok(Seen { value, round })
            };
            let seen = (0..vcpus).map(|vcpu| Ok([load(vcpu, 0)?, load(vcpu, 1)?]));
            let seen = seen.collect::<Outcome<Vec<_>>>()?;
            let values: Vec<_> = seen.iter().map(|vcpu| vcpu.map(|seen| seen.value)).collect();
            assert!(!forbidden(&seen), "batch {batch}, round {round}: {values:x?}");
        }
    }
    Ok(())
}

/// MP: the second store is never seen without the first.
fn stores_are_seen_in_order(backend: &Backend) -> Outcome {
    for words in [WITHIN, ACROSS] {
        let writer: Body<'_> = &|p, words| {
            p.mov(words.x(), rdi)?;
            Ok(p.mov(words.y(), rdi)?)
        };
        let reader: Body<'_> = &|p, words| {
            p.mov(rax, words.y())?;
            Ok(p.mov(rdx, words.x())?)
        };
        litmus(backend, words, &[writer, reader], |seen| seen[1][0].any_new() && seen[1][1].any_old())?;
    }
    Ok(())
}

/// LB: not both load what the other stores behind its load.
fn loads_do_not_see_what_depends_on_them(backend: &Backend) -> Outcome {
    for words in [WITHIN, ACROSS] {
        let first: Body<'_> = &|p, words| {
            p.mov(rax, words.x())?;
            Ok(p.mov(words.y(), rdi)?)
        };
        let second: Body<'_> = &|p, words| {
            p.mov(rax, words.y())?;
            Ok(p.mov(words.x(), rdi)?)
        };
        litmus(backend, words, &[first, second], |seen| seen.iter().all(|vcpu| vcpu[0].any_new()))?;
    }
    Ok(())
}

/// IRIW: two readers agree on which of two stores by two others came first.
fn all_see_stores_in_the_same_order(backend: &Backend) -> Outcome {
    for words in [WITHIN, ACROSS] {
        let bodies: [Body<'_>; 4] = [
            &|p, words| Ok(p.mov(words.x(), rdi)?),
            &|p, words| Ok(p.mov(words.y(), rdi)?),
            &|p, words| {
                p.mov(rax, words.x())?;
                Ok(p.mov(rdx, words.y())?)
            },
            &|p, words| {
                p.mov(rdx, words.y())?;
                Ok(p.mov(rax, words.x())?)
            },
        ];
        litmus(backend, words, &bodies, |seen| {
            let [x2, y2] = seen[2].map(Seen::halves);
            let [x3, y3] = seen[3].map(Seen::halves);
            // Half by half: each is a store of its own.
            (0..2).any(|x| (0..2).any(|y| x2[x] && !y2[y] && y3[y] && !x3[x]))
        })?;
    }
    Ok(())
}

/// SB: of two vCPUs that store and then load what the other stores, one sees the other's.
fn store_buffering(
    backend: &Backend,
    words: Words,
    store: impl Fn(&mut Program, AsmMemoryOperand) -> Outcome,
) -> Outcome {
    let first: Body<'_> = &|p, words| {
        store(p, words.x())?;
        Ok(p.mov(rax, words.y())?)
    };
    let second: Body<'_> = &|p, words| {
        store(p, words.y())?;
        Ok(p.mov(rax, words.x())?)
    };
    litmus(backend, words, &[first, second], |seen| seen.iter().all(|vcpu| vcpu[0].any_old()))
}

fn loads_do_not_pass_fences(backend: &Backend) -> Outcome {
    for words in [WITHIN, ACROSS] {
        store_buffering(backend, words, |p, word| {
            p.mov(word, rdi)?;
            Ok(p.mfence()?)
        })?;
        store_buffering(backend, words, |p, word| {
            p.mov(word, rdi)?;
            Ok(p.lock().add(qword_ptr(layout::DATA + 0x200), 0)?)
        })?;
    }
    Ok(())
}

fn locked_stores(backend: &Backend, words: Words) -> Outcome {
    store_buffering(backend, words, |p, word| Ok(p.xchg(word, rdi)?))?;
    store_buffering(backend, words, |p, word| {
        // Adds what is missing.
        p.mov(rdx, rdi)?;
        p.sub(rdx, word)?;
        Ok(p.lock().xadd(word, rdx)?)
    })
}

fn loads_do_not_pass_locked_stores(backend: &Backend) -> Outcome {
    locked_stores(backend, WITHIN)
}

fn loads_do_not_pass_locked_stores_across_pages(backend: &Backend) -> Outcome {
    locked_stores(backend, ACROSS)
}

/// Three words that REP STOSW and REP MOVSW write: none is seen half new, and where they go down, none is seen before
/// the ones above it.
fn string_stores_are_whole_words_and_in_order_downwards(backend: &Backend) -> Outcome {
    use iced_x86::code_asm::{ax, cx, dx, word_ptr};
    const SOURCE: u64 = layout::DATA + 0x1_4000;
    let words = |down: bool| {
        let at = layout::DATA + 0x1_5000;
        if down { [at + 4, at + 2, at] } else { [at, at + 2, at + 4] }
    };
    for down in [false, true] {
        for copies in [false, true] {
            let [first, middle, last] = words(down);
            // Stores the round in both bytes of each word.
            let writer: Body<'_> = &|p, _| {
                let (source, destination) = (u32::try_from(SOURCE + first % 8)?, u32::try_from(first)?);
                p.mov(rdx, rcx)?;
                p.mov(eax, iced_x86::code_asm::ecx)?;
                p.imul_3(eax, eax, 0x101)?;
                for word in words(down) {
                    p.mov(word_ptr(SOURCE + word % 8), ax)?;
                }
                p.mov(iced_x86::code_asm::edi, destination)?;
                p.mov(esi, source)?;
                p.mov(iced_x86::code_asm::ecx, 3)?;
                if down {
                    p.std()?;
                }
                if copies {
                    p.rep().movsw()?;
                } else {
                    p.rep().stosw()?;
                }
                p.cld()?;
                Ok(p.mov(rcx, rdx)?)
            };
            // The last word, the middle one and the first, in this order from bit 32 of RAX down.
            let reader: Body<'_> = &|p, _| {
                p.xor(eax, eax)?;
                p.mov(ax, word_ptr(last))?;
                p.shl(rax, 16)?;
                p.mov(ax, word_ptr(middle))?;
                p.shl(rax, 16)?;
                p.mov(ax, word_ptr(first))?;
                Ok(p.mov(dx, cx)?)
            };
            litmus(backend, WITHIN, &[writer, reader], |seen| {
                let [value, round] = seen[1].map(|seen| seen.value);
                let parts = [0, 16, 32].map(|shift| value >> shift & 0xffff);
                let torn = parts.iter().any(|word| word >> 8 != word & 0xff);
                let new = parts.map(|word| word == round * 0x101);
                // Upwards they may become visible in another order (Intel SDM 3A 9.2.4).
                torn || down && (new[2] && !new[1] || new[1] && !new[0])
            })?;
        }
    }
    Ok(())
}
