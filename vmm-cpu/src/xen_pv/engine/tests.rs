//! Guests in ring 3, on every backend that is there.

mod entries;
mod kicks;
mod registers;
mod shim;

use std::sync::Arc;
use std::time::Duration;

use iced_x86::code_asm::*;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};

use super::native::XCR0_KNOWN;
use super::private::{Private, VA_SYSCALL};
use super::shim::ShimPages;
use super::*;
use crate::cpuid::Feature;
use crate::state::rflags;

const RAM: u64 = 8 << 20;
const KERNEL_ROOT: u64 = 0x1000;
const USER_ROOT: u64 = 0x2000;
/// Lowest-level table of the kernel's code, which both halves of these guests share as far as they run it.
const LEAF: u64 = 0x5000;
const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
/// Where guests see guest-physical 0.
const BASE: u64 = 0xffff_8800_0000_0000;

/// Present, writable, user, accessed, dirty.
const PAGE: u64 = 0x67;

/// A machine whose both roots map the first 2 MiB of its RAM at [`BASE`], in small pages, and what follows too.
struct Guest {
    machine: Ring3Machine,
    engine: Ring3,
}

impl Guest {
    fn write(&self, gpa: u64, value: u64) {
        self.machine.ram().memory().write_obj(value, GuestAddress(gpa)).unwrap();
    }

    fn read(&self, gpa: u64) -> u64 {
        self.machine.ram().memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    fn new(backend: &dyn crate::Hypervisor, shim: bool) -> Self {
        let shadows = backend.capabilities().shadowed_page_tables;
        let layout = Layout::new(RAM).unwrap();
        let config = Ring3Config::new(layout).vcpus(2).store_in_guest(shadows).shim(shim);
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), RAM)).build().unwrap();
        let machine = Ring3Machine::new(backend, &config, &ram).unwrap();
        let engine = machine.create_engine(0).unwrap();
        let mut guest = Self { machine, engine };
        // One set of tables under both roots: 4 tables of 2 MiB at LEAF.
        for root in [KERNEL_ROOT, USER_ROOT] {
            guest.write(root + (BASE >> 39 & 0x1ff) * 8, 0x3000 | PAGE);
        }
        guest.write(0x3000, 0x4000 | PAGE);
        for table in 0..4 {
            guest.write(0x4000 + table * 8, (LEAF + table * 0x1000) | PAGE);
        }
        for page in 0..RAM >> 12 {
            guest.write(LEAF + page * 8, page << 12 | PAGE);
        }
        guest.engine.prepare_root(GuestAddress(KERNEL_ROOT), GuestMode::Kernel).unwrap();
        guest.engine.prepare_root(GuestAddress(USER_ROOT), GuestMode::User).unwrap();
        guest.engine.set_kernel_root(GuestAddress(KERNEL_ROOT)).unwrap();
        guest.engine.set_user_root(Some(GuestAddress(USER_ROOT))).unwrap();
        let general = &mut guest.engine.context().general;
        (general.rip, general.rsp) = (BASE + CODE, BASE + STACK);
        guest
    }

    fn load(&mut self, assemble: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
        let mut a = CodeAssembler::new(64).unwrap();
        assemble(&mut a).unwrap();
        let code = a.assemble(BASE + CODE).unwrap();
        self.machine.ram().memory().write_slice(&code, GuestAddress(CODE)).unwrap();
    }

    fn has_shim(&self) -> bool {
        !self.engine.fast_counts().is_empty()
    }

    fn run(&mut self) -> EngineExit {
        self.engine.run().unwrap()
    }

    fn general(&mut self) -> &mut GeneralRegisters {
        &mut self.engine.context().general
    }
}

/// Runs a test on every backend.
fn everywhere(test: impl Fn(Guest)) {
    for name in crate::backend_names() {
        if *name == super::super::NAME {
            continue;
        }
        match crate::open_backend(name) {
            Ok(backend) => {
                for shim in [false, true] {
                    println!("on {name}, {}", if shim { "with shim" } else { "without shim" });
                    test(Guest::new(&*backend, shim));
                }
            }
            Err(error) => println!("skipped on {name}: {error}"),
        }
    }
}

fn page_fault(error_code: u32, address: u64) -> EngineExit {
    EngineExit::Exception { vector: 14, error_code, address }
}

fn exception(vector: u8, error_code: u32) -> EngineExit {
    EngineExit::Exception { vector, error_code, address: 0 }
}

#[test]
fn syscall_brings_the_registers_and_takes_them_back() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(rax, 17_u64)?;
            a.mov(rdi, 0x1122_3344_5566_7788_u64)?;
            a.xor(ebx, ebx)?; // ZF and PF
            a.syscall()?;
            a.lea(rsi, ptr(rax + 1))?;
            a.syscall()?;
            Ok(())
        });
        assert_eq!(guest.run(), EngineExit::Syscall);
        let after = guest.engine.context().general;
        assert_eq!((after.rax, after.rdi), (17, 0x1122_3344_5566_7788));
        assert_eq!((after.rsp, after.rcx), (BASE + STACK, after.rip));
        assert_eq!(after.rflags & (rflags::ZF | rflags::IF | rflags::CF), rflags::ZF | rflags::IF);
        let context = guest.engine.context();
        assert_eq!((context.cs, context.ss, context.mode), (0xe033, 0xe02b, GuestMode::Kernel));
        context.general.rax = 99;
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rsi, 100);
        assert_eq!(guest.general().rdi, 0x1122_3344_5566_7788);
    });
}

#[test]
fn exceptions_say_vector_error_and_address() {
    everywhere(|mut guest| {
        let unmapped = BASE + RAM + 0x123;
        guest.load(|a| {
            a.mov(rax, unmapped)?;
            a.mov(qword_ptr(rax), rax)?; // #PF
            a.ud2()?;
            a.int3()?;
            a.hlt()?; // #GP
            a.int(0x80)?; // #GP with the vector
            a.xor(ecx, ecx)?;
            a.div(ecx)?; // #DE
            Ok(())
        });
        assert_eq!(guest.run(), page_fault(6, unmapped));
        assert_eq!(guest.general().rip, BASE + CODE + 10);
        guest.general().rip += 3;
        assert_eq!(guest.run(), exception(6, 0));
        guest.general().rip += 2;
        let int3 = guest.general().rip;
        assert_eq!(guest.run(), exception(3, 0));
        assert_eq!(guest.general().rip, int3 + 1, "a trap");
        assert_eq!(guest.run(), exception(13, 0));
        guest.general().rip += 1;
        // One kind of KVM makes another exception of it.
        let software = guest.run();
        assert!([exception(13, 0x80 << 3 | 2), exception(6, 0)].contains(&software), "{software:?}");
        guest.general().rip += 2;
        assert_eq!(guest.run(), exception(0, 0));
        assert_eq!(guest.general().rsp, BASE + STACK, "nothing was pushed to the guest's stack");
    });
}

#[test]
fn a_jump_to_a_stub_is_a_syscall_or_a_fault_and_nothing_else() {
    everywhere(|mut guest| {
        for vector in 0..32 {
            let stub =
                (PRIVATE_VA..PRIVATE_VA + 0x1000).find(|rip| Private::exception_of(*rip) == Some(vector));
            guest.general().rip = stub.unwrap();
            assert_eq!(guest.run(), exception(13, 0), "stub {vector}");
            assert_eq!(guest.general().rip, stub.unwrap());
        }
        guest.general().rip = if guest.has_shim() { ShimPages::entry(0) } else { VA_SYSCALL };
        guest.general().rcx = 0x1234;
        guest.general().r11 = u64::MAX;
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rip, 0x1234);
    });
}

#[test]
fn privileged_instructions_fault_in_ring_3() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.cli()?;
            a.rdmsr()?;
            a.wrmsr()?;
            a.out(0x20, al)?;
            a.invlpg(ptr(rax))?;
            a.swapgs()?;
            Ok(())
        });
        for length in [3, 3, 1, 2, 2, 2, 3, 3] {
            let rip = guest.general().rip;
            assert_eq!(guest.run(), exception(13, 0), "{:#x}", rip - BASE - CODE);
            assert_eq!(guest.general().rip, rip);
            guest.general().rip += length;
        }
    });
}

#[test]
fn bad_contexts_fault_and_leave_the_registers() {
    everywhere(|mut guest| {
        guest.load(|a| a.syscall());
        for (code, stack, rip, expected) in [
            (0x33, 0xe02b, BASE + CODE, exception(13, 0x30)),
            (0xe008, 0xe02b, BASE + CODE, exception(13, 0xe008)),
            (0xe033, 0xe010, BASE + CODE, exception(13, 0xe010)),
            (0xe033, 0xe02b, 0x8000_0000_0000, exception(13, 0)),
        ] {
            let context = guest.engine.context();
            (context.cs, context.ss, context.general.rip) = (code, stack, rip);
            let before = *context;
            assert_eq!(guest.run(), expected);
            assert_eq!(*guest.engine.context(), before);
        }
        let context = guest.engine.context();
        (context.cs, context.ss, context.general.rip) = (0xe033, 0xe02b, BASE + CODE);
        assert_eq!(guest.run(), EngineExit::Syscall);
    });
}

#[test]
fn single_step_and_breakpoints_trap() {
    everywhere(|mut guest| {
        if guest.machine.vm().clock().is_some() && guest.engine.store_in_guest_for_tests() {
            // KVM with shadowed tables reports them by itself; covered where it is hardware-assisted.
            return;
        }
        guest.load(|a| {
            a.nop()?;
            a.nop()?;
            a.mov(rax, qword_ptr(rbx))?;
            a.syscall()?;
            Ok(())
        });
        guest.general().rflags |= rflags::TF;
        assert_eq!(guest.run(), exception(1, 0));
        assert_eq!(guest.general().rip, BASE + CODE + 1);
        assert_ne!(guest.engine.debug_register(6) & 1 << 14, 0);
        guest.general().rflags &= !rflags::TF;
        guest.general().rbx = BASE + DATA;
        guest.engine.set_debug_register(0, BASE + DATA).unwrap();
        guest.engine.set_debug_register(7, 0x000f_0003).unwrap();
        assert_eq!(guest.run(), exception(1, 0));
        assert_eq!(guest.engine.debug_register(6) & 0xf, 1);
        assert!(guest.engine.set_debug_register(0, PRIVATE_VA).is_err());
        assert!(guest.engine.set_debug_register(4, 0).is_err());
        assert_eq!(guest.run(), EngineExit::Syscall);
    });
}

/// SYSCALL in the shadow of a MOV SS that hit a breakpoint: the debug exception comes in the stub.
#[test]
fn debug_exceptions_in_the_stubs_lose_nothing() {
    everywhere(|mut guest| {
        if guest.engine.store_in_guest_for_tests() {
            return;
        }
        guest.load(|a| {
            a.mov(ss, word_ptr(rbx))?;
            a.syscall()?;
            a.mov(ss, word_ptr(rbx))?;
            a.int3()?;
            a.ud2()?;
            Ok(())
        });
        guest.write(DATA, 0xe02b);
        guest.general().rbx = BASE + DATA;
        guest.engine.set_debug_register(0, BASE + DATA).unwrap();
        guest.engine.set_debug_register(7, 0x0007_0003).unwrap();
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rip, BASE + CODE + 4);
        assert_eq!(guest.general().rsp, BASE + STACK);
        assert_eq!(guest.run(), exception(3, 0));
        assert_eq!(guest.general().rip, BASE + CODE + 7);
        assert_eq!(guest.general().rsp, BASE + STACK);
    });
}
