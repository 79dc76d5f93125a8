//! A substitute on a machine of its own, as an engine would have it.

use std::sync::Arc;

use vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_memory::{GuestRam, PageBitmap};

use super::*;
use crate::cpuid::{CpuidEntry, CpuidTable};
use crate::state::{Segment, rflags};
use crate::vcpu::EmptyBus;
use crate::vm::GuestAccess;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x3000;

struct Engine {
    vm: SubstituteVm,
    ram: GuestRam,
    substitute: Substitute,
    before: Between,
}

/// At privilege level 0 of flat 32-bit code without paging.
fn engine(max_vcpus: u32) -> Engine {
    let vm = SubstituteVm::new(CpuidTable::default(), max_vcpus);
    let ram = GuestRam::builder().ram(1 << 20).track_dirty(true).build().unwrap();
    for region in ram.regions() {
        vm.map_memory(region, GuestAccess::ReadWrite).unwrap();
    }
    let data = Segment::data32(0x10);
    let system = SystemRegisters {
        cs: Segment::code32(8),
        ds: data,
        es: data,
        ss: data,
        cr0: 0x31,
        cr4: 1 << 9,
        ..SystemRegisters::at_reset()
    };
    let general =
        GeneralRegisters { rip: CODE, rsp: 0x8000, rbx: DATA, rflags: rflags::FIXED, ..Default::default() };
    let before = Between { general, system, shadow: InterruptShadow::default(), nmi_masked: false };
    let substitute = Substitute::new(&vm, 0);
    Engine { vm, ram, substitute, before }
}

impl Engine {
    fn execute(&mut self, code: &[u8]) -> Outcome {
        self.ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        self.substitute.load(&self.before).unwrap();
        match self.substitute.fetch() {
            Ok(fetched) => {
                assert_eq!(fetched.bytes(), code);
                if fetched.needs_vectors() {
                    self.substitute.load_vectors(XsaveArea::at_reset()).unwrap();
                }
                self.substitute.execute(&fetched, &mut EmptyBus)
            }
            Err(reason) => Outcome::Refused(reason),
        }
    }

    fn put(&self, gpa: u64, word: u64) {
        self.ram.memory().write_obj(word, GuestAddress(gpa)).unwrap();
    }

    fn word(&self, gpa: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }
}

fn is_done(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Done { trap: 0 })
}

#[test]
fn one_instruction_and_no_more() {
    let mut engine = engine(1);
    // mov eax, 5; the next would be the same of ecx.
    engine.ram.memory().write_slice(&[0xb9, 5, 0, 0, 0], GuestAddress(CODE + 5)).unwrap();
    assert!(is_done(&engine.execute(&[0xb8, 5, 0, 0, 0])));
    let after = engine.substitute.registers();
    assert_eq!((after.general.rax, after.general.rcx, after.general.rip), (5, 0, CODE + 5));
    assert_eq!(after.system, SystemRegisters { cr0: 0x31, ..engine.before.system });
}

#[test]
fn code_and_memory_are_read_anew_each_time() {
    let mut engine = engine(1);
    for value in [1, 2, 3] {
        engine.put(DATA, value);
        // mov ecx/edx/..., [ebx]
        assert!(is_done(&engine.execute(&[0x8b, 0x0b])));
        assert_eq!(engine.substitute.registers().general.rcx, value);
    }
}

#[test]
fn faults_come_back_and_change_nothing() {
    let mut engine = engine(1);
    // ud2; div ecx by zero
    for (code, expected) in [(&[0x0f, 0x0b][..], vector::UD), (&[0xf7, 0xf1], vector::DE)] {
        match engine.execute(code) {
            Outcome::Fault(exception) => assert_eq!(exception.vector, expected),
            other => panic!("{other:?}"),
        }
        assert_eq!(engine.substitute.registers().general, engine.before.general);
    }
}

#[test]
fn what_is_the_engines_is_refused() {
    let mut engine = engine(1);
    // invlpg [ebx]; mov cr3, eax; wrmsr; rdtsc; cpuid; hlt; vmcall; lmsw ax
    for code in [
        &[0x0f, 0x01, 0x3b][..],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x30],
        &[0x0f, 0x31],
        &[0x0f, 0xa2],
        &[0xf4],
        &[0x0f, 0x01, 0xc1],
        &[0x0f, 0x01, 0xf0],
    ] {
        assert!(matches!(engine.execute(code), Outcome::Refused(_)), "{code:x?}");
    }
    // xsaves [ebx], which the guest's processor may have.
    match engine.execute(&[0x0f, 0xc7, 0x2b]) {
        Outcome::Refused(reason) => assert!(reason.starts_with("xsaves "), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn single_step_and_shadow_are_told() {
    let mut engine = engine(1);
    engine.before.general.rflags |= 1 << 8;
    assert!(matches!(engine.execute(&[0x90]), Outcome::Done { trap: dr6::BS }));
    // mov ss, ecx holds the step off, and interrupts.
    engine.before.general.rcx = 0;
    engine.before.system.cr0 = 0x10;
    let outcome = engine.execute(&[0x8e, 0xd1]);
    assert!(is_done(&outcome), "{outcome:?}");
    assert!(engine.substitute.registers().shadow.mov_ss);
    // The shadow of the instruction before ends with this one.
    engine.before.general.rflags = rflags::FIXED;
    engine.before.shadow.sti = true;
    assert!(is_done(&engine.execute(&[0x90])));
    assert_eq!(engine.substitute.registers().shadow, InterruptShadow::default());
}

#[test]
fn a_locked_access_must_be_aligned_where_there_are_others() {
    // lock inc dword [ebx]
    let code = [0xf0, 0xff, 0x03];
    for (vcpus, address, done) in [(2, DATA, true), (2, DATA + 1, false), (1, DATA + 1, true)] {
        let mut engine = engine(vcpus);
        engine.before.general.rbx = address;
        assert_eq!(is_done(&engine.execute(&code)), done, "{vcpus} vCPUs, {address:#x}");
        assert_eq!(engine.word(DATA) != 0, done);
    }
}

#[test]
fn replaced_entries_are_told() {
    let mut engine = engine(1);
    // mov [ebx], eax
    for (old, new, replaced) in [(0x5001, 0x6001, true), (0x5000, 0x6001, false), (0x5001, 0x5021, false)] {
        engine.put(DATA, old);
        engine.before.general.rax = new;
        assert!(is_done(&engine.execute(&[0x89, 0x03])));
        assert_eq!((engine.word(DATA), engine.substitute.has_replaced_entries()), (new, replaced));
    }
    // cmpxchg8b [ebx] that finds something else leaves it.
    engine.put(DATA, 0x5001);
    assert!(is_done(&engine.execute(&[0x0f, 0xc7, 0x0b])));
    assert!(!engine.substitute.has_replaced_entries());
}

#[test]
fn vector_stores_count_as_any_other() {
    let mut engine = engine(1);
    engine.put(DATA + 8, 0x5001);
    // movdqu [ebx], xmm0
    assert!(is_done(&engine.execute(&[0xf3, 0x0f, 0x7f, 0x03])));
    assert!(engine.substitute.has_replaced_entries());
    assert_eq!(engine.substitute.vectors().unwrap().xstate_bv(), 3);
    // movdqu xmm1, [ebx]
    engine.put(DATA, 7);
    engine.put(DATA + 8, 9);
    assert!(is_done(&engine.execute(&[0xf3, 0x0f, 0x6f, 0x0b])));
    assert_eq!(engine.substitute.vectors().unwrap().xmm(1), Some(9 << 64 | 7));
}

#[test]
fn writes_are_logged_and_memory_comes_and_goes() {
    let mut engine = engine(1);
    let region = engine.ram.regions().into_iter().next().unwrap();
    engine.vm.log_writes(GuestAddress(0), true).unwrap();
    assert!(is_done(&engine.execute(&[0x89, 0x03])));
    let mut pages = PageBitmap::for_region(&region);
    engine.vm.harvest(&region, &mut pages).unwrap();
    assert!(pages.contains(3) && pages.count() == 1);
    engine.vm.unmap_memory(GuestAddress(0)).unwrap();
    assert!(matches!(engine.execute(&[0x90]), Outcome::Refused(_)));
    engine.vm.map_memory(Arc::clone(&region), GuestAccess::ReadOnly).unwrap();
    engine.put(DATA, 1);
    // The store goes to a device, of which there is none.
    assert!(is_done(&engine.execute(&[0x89, 0x03])));
    assert_eq!(engine.word(DATA), 1);
}

/// A processor with AVX, and a substitute in front of code that may use it.
fn engine_with_avx() -> Engine {
    let mut engine = engine(1);
    let mut cpuid = CpuidTable::default();
    // The upper halves of sixteen registers, behind legacy area and header.
    cpuid.set(CpuidEntry::new(0xd, Some(2), [256, 576, 0, 0]));
    let vm = SubstituteVm::new(cpuid, 1);
    for region in engine.ram.regions() {
        vm.map_memory(region, GuestAccess::ReadWrite).unwrap();
    }
    engine.substitute = Substitute::new(&vm, 0);
    engine.vm = vm;
    (engine.before.system.cr4, engine.before.system.xcr0) = (1 << 9 | 1 << 18, 7);
    engine
}

impl Engine {
    /// As [`Engine::execute`], with those vector registers.
    fn execute_with(&mut self, code: &[u8], area: &XsaveArea) -> Outcome {
        self.ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        self.substitute.load(&self.before).unwrap();
        let fetched = self.substitute.fetch().unwrap();
        assert!(fetched.needs_vectors());
        self.substitute.load_vectors(area.clone()).unwrap();
        self.substitute.execute(&fetched, &mut EmptyBus)
    }
}

#[test]
fn wide_moves_take_both_halves_and_clear_what_they_do_not_load() {
    let mut engine = engine_with_avx();
    let words = [0x11, 0x22, 0x33, 0x44];
    for (word, gpa) in words.into_iter().zip((DATA..).step_by(8)) {
        engine.put(gpa, word);
    }
    let mut fresh = vec![0xee; 576 + 256];
    fresh[..576].copy_from_slice(XsaveArea::at_reset().bytes());
    let fresh = XsaveArea::from_bytes(fresh).unwrap();
    // vmovdqu ymm1, [ebx]
    let outcome = engine.execute_with(&[0xc5, 0xfe, 0x6f, 0x0b], &fresh);
    assert!(is_done(&outcome), "{outcome:?}");
    let loaded = engine.substitute.vectors().unwrap();
    assert_eq!((loaded.xstate_bv(), loaded.xmm(1)), (7, Some(0x22 << 64 | 0x11)));
    let high = |area: &XsaveArea, register: usize| area.bytes()[576 + register * 16..][..16].to_vec();
    assert_eq!(high(&loaded, 1), [[0x33, 0, 0, 0, 0, 0, 0, 0], [0x44, 0, 0, 0, 0, 0, 0, 0]].concat());
    assert_eq!(high(&loaded, 0), [0; 16], "in its initial state until now");
    // vmovups [ebx + 0x40], ymm1
    engine.before.general.rbx = DATA + 0x40;
    assert!(is_done(&engine.execute_with(&[0xc5, 0xfc, 0x11, 0x0b], &loaded)));
    assert_eq!(engine.substitute.vectors().unwrap(), loaded);
    assert_eq!([0, 8, 16, 24].map(|offset| engine.word(DATA + 0x40 + offset)), words);
    // vmovdqu xmm1, [ebx]
    assert!(is_done(&engine.execute_with(&[0xc5, 0xfa, 0x6f, 0x0b], &loaded)));
    assert_eq!(high(&engine.substitute.vectors().unwrap(), 1), [0; 16]);
}

#[test]
fn wide_moves_fault_as_the_processor_has_it() {
    let mut engine = engine_with_avx();
    let area = XsaveArea::from_bytes(vec![0; 576 + 256]).unwrap();
    let fault = |engine: &mut Engine, code: &[u8]| match engine.execute_with(code, &area) {
        Outcome::Fault(exception) => exception.vector,
        other => panic!("{other:?}"),
    };
    // vmovaps ymm1, [ebx] of 16-byte alignment
    engine.before.general.rbx = DATA + 16;
    assert_eq!(fault(&mut engine, &[0xc5, 0xfc, 0x28, 0x0b]), vector::GP);
    // vmovups ymm1, [ebx] while TS is set, without AVX in XCR0, without OSXSAVE
    let code = [0xc5, 0xfc, 0x10, 0x0b];
    engine.before.system.cr0 |= 8;
    assert_eq!(fault(&mut engine, &code), vector::NM);
    engine.before.system.xcr0 = 3;
    assert_eq!(fault(&mut engine, &code), vector::UD);
    (engine.before.system.xcr0, engine.before.system.cr4) = (7, 1 << 9);
    assert_eq!(fault(&mut engine, &code), vector::UD);
    // vpaddd ymm1, ymm1, [ebx]
    match engine.execute_with(&[0xc5, 0xf5, 0xfe, 0x0b], &area) {
        Outcome::Refused(reason) => assert!(reason.starts_with("vpaddd "), "{reason}"),
        other => panic!("{other:?}"),
    }
}
