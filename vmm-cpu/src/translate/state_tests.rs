use super::*;
use crate::translate::cpu::efer;
use crate::translate::test_support::Guest;

/// A saved guest in long mode.
fn saved() -> CpuState {
    let mut guest = Guest::long();
    guest.core.save_state()
}

#[test]
fn what_was_about_to_be_delivered_is_not_lost() {
    let mut page_fault = ExceptionEvent::injected(vector::PF, Some(2));
    (page_fault.stage, page_fault.payload) = (ExceptionStage::Pending, Some(0x1234));
    let mut debug = ExceptionEvent::injected(vector::DB, None);
    (debug.stage, debug.payload) = (ExceptionStage::Pending, Some(1));
    let exceptions = [page_fault, debug, ExceptionEvent::injected(vector::GP, Some(0))];
    for exception in exceptions {
        let mut state = saved();
        state.events.exception = Some(exception);
        let mut guest = Guest::long();
        guest.core.load_state(&state).unwrap();
        assert_eq!(guest.core.save_state().events, state.events);
    }
    for software in [false, true] {
        let mut state = saved();
        state.events.interrupt = Some(InterruptEvent::new(0x40, software));
        let mut guest = Guest::long();
        guest.core.load_state(&state).unwrap();
        assert_eq!(guest.core.save_state().events, state.events);
    }
}

#[test]
fn an_interrupt_that_came_as_a_message_of_the_pic_is_not_lost() {
    let mut guest = Guest::long();
    guest.core.ext_int = true;
    assert!(guest.core.save_state().events.intr);
}

#[test]
fn the_counter_continues_from_what_was_written() {
    let mut guest = Guest::long();
    // Instructions that the clock has not heard of.
    guest.core.instructions = 7;
    guest.core.set_msr(0x10, 1000).unwrap();
    assert_eq!(guest.core.msr(0x10), Some(1000));
}

#[test]
fn hidden_features_cannot_be_switched_on() {
    let mut guest = Guest::protected();
    assert_eq!(guest.core.set_msr(0xc000_0080, efer::SCE), None);
    guest.core.efer_allowed = efer::SCE;
    assert_eq!(guest.core.set_msr(0xc000_0080, efer::SCE), Some(()));
    assert_eq!(guest.core.set_msr(0xc000_0080, efer::NXE), None);
    assert_eq!(guest.core.msr(0xc000_0103), None);
}
