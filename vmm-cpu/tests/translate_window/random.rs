//! Programs of random accesses above a kernel that changes page tables at random. If it flushes what it changes, the program
//! sees the same on all tiers, and so do the page tables. Where instructions are counted, it need not flush anything.

use iced_x86::code_asm::*;
use vmm_memory::PageBitmap;
use vmm_memory::vm_memory::GuestAddress;

use crate::machine::{
    ACCESSED, Answer, CR4, Call, DIRTY, Emit, GLOBAL, OTHER_SPACE, PRESENT, RESUME_AT_R8, SPACE, STACK,
    Setup, Tier, USER, WRITABLE, call, page, run_on,
};

/// Programs that the test runs, unless the environment says `PROGRAMS`.
const PROGRAMS: u64 = 80;
/// Steps of each, and page faults that its kernel does something about.
const STEPS: u64 = 120;
const ANSWERS: u64 = 60;

/// Neighbours, one that the TLB keeps in their place, and another region.
const PLACES: [u64; 5] =
    [0x1234_5678_0000, 0x1234_5678_1000, 0x1234_5678_0000 + (2048 << 12), 0x7ffe_0000_0000, 0x60_0000];
/// 2 MiB whose pages are parts of a large one now and then.
const LARGE: u64 = 0x2222_2220_0000;

/// Splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// One in so many times.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// Accesses where RBX points to, which RSI is near.
const ACCESSES: &[Emit] = &[
    |a| a.add(r12, qword_ptr(rbx)),
    |a| a.mov(r13, qword_ptr(rbx)),
    |a| a.mov(qword_ptr(rbx), r12),
    |a| a.xor(qword_ptr(rbx), r13),
    |a| a.adc(dword_ptr(rbx + 8), 5),
    |a| a.lock().xadd(qword_ptr(rbx), r14),
    |a| a.xchg(qword_ptr(rbx), r10),
    |a| a.movups(xmm1, xmmword_ptr(rbx)),
    |a| a.movups(xmmword_ptr(rbx), xmm1),
    |a| a.lock().cmpxchg(qword_ptr(rbx), r15),
    |a| a.bts(qword_ptr(rbx), r12),
    |a| a.setc(byte_ptr(rbx)),
    |a| a.cmovc(r15, qword_ptr(rbx)),
    |a| {
        a.mov(rdi, rbx)?;
        a.mov(ecx, 24)?;
        a.rep().movsb()
    },
    |a| {
        a.lea(rsp, ptr(rbx + 16))?;
        a.push(r12)?;
        a.pop(r15)?;
        a.mov(rsp, STACK)
    },
    |a| a.add(ah, byte_ptr(rbx)),
];

/// What a page table entry may come to hold.
fn entry(random: &mut Random, flushes: bool) -> u64 {
    if random.once_in(8) {
        return 0;
    }
    let mut bits = PRESENT | USER;
    for bit in [WRITABLE, WRITABLE, ACCESSED, DIRTY] {
        bits |= if random.once_in(2) { bit } else { 0 };
    }
    bits ^= if random.once_in(12) { USER } else { 0 };
    bits |= if !flushes && random.once_in(5) { GLOBAL } else { 0 };
    page(1 + random.below(6)) | bits
}

/// An address of the program's, not always aligned.
fn address(random: &mut Random) -> u64 {
    let page = match random.below(7) {
        0 => LARGE + random.below(3) * 0x1000,
        _ => random.of(&PLACES),
    };
    let offset = random.of(&[0, 8, 0x7f8, 0x800, 0x801, 0xffc, 0xff0]);
    page + offset
}

fn prepare(setup: &mut Setup, seed: u64, flushes: bool) {
    let random = &mut Random(seed);
    let large = page(0) + 0x20_0000;
    for n in 0..8 {
        for word in 0..512 {
            setup.word(page(n) + 8 * word, random.next());
        }
    }
    let mut entries = Vec::new();
    for space in [SPACE, OTHER_SPACE] {
        for place in PLACES {
            entries.push((setup.map(space, place, entry(random, flushes), 0), place));
        }
        for n in 0..3 {
            setup.map(space, LARGE + n * 0x1000, large + n * 0x1000, PRESENT | USER | WRITABLE);
        }
    }
    let directories = [SPACE, OTHER_SPACE].map(|space| {
        let directory = setup.entry(space, LARGE, 21);
        (directory, setup.read(directory))
    });
    for _ in 0..ANSWERS {
        let (at, place) = random.of(&entries);
        let store = if random.once_in(4) { (0, 0) } else { (at, entry(random, flushes)) };
        let invalidate = if flushes {
            place
        } else if random.once_in(2) {
            0
        } else {
            address(random)
        };
        let resume = if random.once_in(3) { 0 } else { RESUME_AT_R8 };
        setup.answer(Answer { store, invalidate, resume });
    }
    let mut a = CodeAssembler::new(64).unwrap();
    for _ in 0..STEPS {
        match random.below(12) {
            0..=7 => {
                let mut next = a.create_label();
                a.lea(r8, ptr(next)).unwrap();
                a.mov(rbx, address(random)).unwrap();
                a.mov(rsi, address(random)).unwrap();
                random.of(ACCESSES)(&mut a).unwrap();
                a.set_label(&mut next).unwrap();
                a.nop().unwrap();
                a.mov(rsp, STACK).unwrap();
            }
            8 => {
                let (at, place) = random.of(&entries);
                call(&mut a, Call::Store(at, entry(random, flushes)));
                if flushes {
                    call(&mut a, Call::Invalidate(place + random.below(0x1000)));
                }
            }
            9 => call(&mut a, Call::Invalidate(address(random))),
            10 => call(&mut a, Call::SetCr3(random.of(&[SPACE, OTHER_SPACE]))),
            _ => match random.below(4) {
                0 => call(&mut a, Call::SetCr4(random.of(&[CR4, CR4 & !(1 << 7)]))),
                1 => {
                    let (directory, table) = random.of(&directories);
                    let whole = large | PRESENT | USER | WRITABLE | 1 << 7;
                    call(&mut a, Call::Store(directory, random.of(&[table, whole, whole | 0x20_0000])));
                    if flushes {
                        call(&mut a, Call::SetCr3(random.of(&[SPACE, OTHER_SPACE])));
                    }
                }
                2 => call(&mut a, Call::Tell(random.below(4) as u8)),
                _ => {
                    let (at, _) = random.of(&entries);
                    call(&mut a, Call::Load(at));
                }
            },
        }
    }
    call(&mut a, Call::Exit);
    setup.program(&mut a);
}

/// What the host does is nothing that the program sees.
fn told(setup: &mut Setup, what: u8) {
    let log = setup.vm.dirty_log().unwrap();
    match what {
        0 => log.start(GuestAddress(0)).unwrap(),
        1 => log.stop(GuestAddress(0)).unwrap(),
        _ => log.harvest(&setup.ram, &mut PageBitmap::for_region(&setup.ram)).unwrap(),
    }
}

/// Runs programs on several tiers, the first of which says what is right.
fn same_on<const N: usize>(tiers: [Tier; N], flushes: bool) {
    let count = std::env::var("PROGRAMS").ok().and_then(|count| count.parse().ok()).unwrap_or(PROGRAMS);
    let (mut faults, mut mapped, mut ended) = (0, 0, 0);
    for seed in 0..count {
        let prepare = |setup: &mut Setup| prepare(setup, seed, flushes);
        let runs = tiers.map(|tier| run_on(tier, &prepare, &told));
        for run in &runs {
            run.assert_same(&runs[0], &format!("program {seed}"));
            let tier = run.setup.tier;
            assert!(run.setup.tables() == runs[0].setup.tables(), "{tier:?}: page tables of program {seed}");
        }
        faults += runs[0].events.len() as u64;
        ended += u64::from(runs[0].registers.rax == 0);
        mapped += runs[N - 1].count("window-pages-mapped");
    }
    eprintln!("{faults} page faults, {mapped} pages mapped, {ended} of {count} came to their end");
    assert!(faults > count && mapped > 5 * count && ended > count / 4);
}

#[test]
fn a_kernel_that_flushes_is_obeyed() {
    let tiers = [Tier::Interpreter, Tier::Translator(false), Tier::Window(true), Tier::Window(false)];
    same_on(tiers, true);
}

#[test]
fn where_instructions_are_counted_what_is_stale_is_the_same() {
    let tiers = [Tier::Interpreter, Tier::Translator(true), Tier::Traced, Tier::Window(true)];
    same_on(tiers, false);
}
