use super::super::super::abi::grant::{CopyEnd, GrantEntry, gtf};
use super::super::super::abi::nr::GRANT_TABLE_OP;
use super::super::super::test_support::{FRAMES, FREE, Guest, L1};
use super::*;
use zerocopy::{Immutable, IntoBytes};

const SELF: u16 = domid::SELF;
/// A free frame, and the first that is no RAM.
const FRAME: u32 = 0x400;
const END: u32 = 0x800;
/// Grant frames that there can be.
const MAX: u32 = 32;

fn op<T: IntoBytes + Immutable>(guest: &mut Guest, command: u64, argument: &T) -> (Result<u64, Errno>, u64) {
    let at = guest.put(argument);
    (guest.call(GRANT_TABLE_OP, &[command, at, 1]), at)
}

fn setup(guest: &mut Guest, dom: u16, nr_frames: u32) -> (i16, Vec<u64>) {
    let frame_list = guest.put(&[0_u64; 40]);
    let request = SetupTable { dom, nr_frames, frame_list, ..Default::default() };
    let (result, at) = op(guest, gnttabop::SETUP_TABLE, &request);
    assert_eq!(result, Ok(0));
    let frames = guest.get::<[u64; 40]>(frame_list).into_iter().take_while(|frame| *frame != 0).collect();
    (guest.get::<SetupTable>(at).status, frames)
}

fn place(guest: &Guest, reference: u32) -> u64 {
    guest.domain.memory.grant_frames().0 * PAGE_SIZE + u64::from(reference) * 8
}

fn grant(guest: &Guest, reference: u32, flags: u16, domid: u16, frame: u32) {
    let at = place(guest, reference);
    guest.domain.memory.write(at, GrantEntry { flags, domid, frame }.as_bytes()).unwrap();
}

fn flags(guest: &Guest, reference: u32) -> u16 {
    guest.get::<GrantEntry>(Guest::va(place(guest, reference))).flags
}

#[test]
fn the_table_grows() {
    assert_eq!((FREE, FRAMES), (FRAME.into(), END.into()));
    let mut guest = Guest::new();
    let (first, _) = guest.domain.memory.grant_frames();
    assert_eq!(setup(&mut guest, SELF, 2), (gntst::OKAY, vec![first, first + 1]));
    let (result, at) = op(&mut guest, gnttabop::QUERY_SIZE, &QuerySize { dom: SELF, ..Default::default() });
    assert_eq!(result, Ok(0));
    let size: QuerySize = guest.get(at);
    assert_eq!((size.status, size.nr_frames, size.max_nr_frames), (gntst::OKAY, 2, MAX));
    assert_eq!(setup(&mut guest, SELF, 1).1.len(), 1, "it does not shrink");
    assert_eq!(guest.domain.grants.frames(), 2);
    assert_eq!(setup(&mut guest, SELF, MAX).1.len(), 32);
    assert_eq!(setup(&mut guest, SELF, MAX + 1), (gntst::GENERAL_ERROR, vec![]));
    assert_eq!(setup(&mut guest, SELF, u32::MAX).0, gntst::GENERAL_ERROR);
    assert_eq!(setup(&mut guest, 0, 1).0, gntst::BAD_DOMAIN);
}

#[test]
fn version_1_it_is() {
    let mut guest = Guest::new();
    let (result, at) = op(&mut guest, gnttabop::GET_VERSION, &GetVersion { dom: SELF, ..Default::default() });
    assert_eq!((result, guest.get::<GetVersion>(at).version), (Ok(0), 1));
    assert_eq!(op(&mut guest, gnttabop::GET_VERSION, &GetVersion::default()).0, Err(Errno::ESRCH));
    assert_eq!(op(&mut guest, gnttabop::SET_VERSION, &1_u32).0, Ok(0));
    assert_eq!(op(&mut guest, gnttabop::SET_VERSION, &2_u32).0, Err(Errno::ENOSYS));
}

#[test]
fn grants_of_others_cannot_be_mapped() {
    let mut guest = Guest::new();
    let (result, at) = op(&mut guest, gnttabop::MAP_GRANT_REF, &MapGrantRef::default());
    assert_eq!((result, guest.get::<MapGrantRef>(at).status), (Ok(0), gntst::BAD_DOMAIN));
    for command in [gnttabop::UNMAP_GRANT_REF, gnttabop::UNMAP_AND_REPLACE] {
        let (result, at) = op(&mut guest, command, &UnmapGrantRef::default());
        assert_eq!((result, guest.get::<UnmapGrantRef>(at).status), (Ok(0), gntst::BAD_HANDLE));
    }
}

#[test]
fn bad_calls_are_refused() {
    let mut guest = Guest::new();
    for command in [0, 1, 2, 5, 6, 7, 8, 10, 11] {
        assert_eq!(guest.call(GRANT_TABLE_OP, &[command, 8, 1]), Err(Errno::EFAULT), "command {command}");
    }
    for command in [3, 4, 9, 12, u64::MAX] {
        assert_eq!(guest.call(GRANT_TABLE_OP, &[command, 8, 1]), Err(Errno::ENOSYS), "command {command}");
    }
    for count in [1 << 31, u64::from(u32::MAX)] {
        assert_eq!(guest.call(GRANT_TABLE_OP, &[0, 8, count]), Err(Errno::EINVAL), "count {count:#x}");
    }
    for command in [gnttabop::SETUP_TABLE, gnttabop::QUERY_SIZE] {
        assert_eq!(guest.call(GRANT_TABLE_OP, &[command, 8, 2]), Err(Errno::EINVAL));
    }
    let request = SetupTable { dom: SELF, nr_frames: 1, frame_list: 8, ..Default::default() };
    assert_eq!(op(&mut guest, gnttabop::SETUP_TABLE, &request).0, Err(Errno::EFAULT));
}

#[test]
fn a_long_list_is_taken_in_parts() {
    let mut guest = Guest::new();
    let list = guest.put(vec![MapGrantRef { status: 1, ..Default::default() }; 3000].as_slice());
    assert_eq!(guest.call(GRANT_TABLE_OP, &[gnttabop::MAP_GRANT_REF, list, 3000]), Ok(0));
    assert_eq!(guest.get::<MapGrantRef>(list + 2999 * 32).status, gntst::BAD_DOMAIN);
}

fn end(place: u64, offset: u16) -> CopyEnd {
    CopyEnd { place, domid: SELF, offset, pad: 0 }
}

#[test]
fn copies_stay_within_the_domain_and_its_pages() {
    let mut guest = Guest::new();
    guest.store(FREE, 511, 0x1122_3344);
    let copy = |guest: &mut Guest, request: &GrantCopy| {
        let (result, at) = op(guest, gnttabop::COPY, request);
        assert_eq!(result, Ok(0));
        guest.get::<GrantCopy>(at).status
    };
    let good = GrantCopy { source: end(FREE, 4088), dest: end(FREE + 1, 0), len: 8, ..Default::default() };
    assert_eq!(copy(&mut guest, &good), gntst::OKAY);
    assert_eq!(guest.load(FREE + 1, 0), 0x1122_3344);
    let with = |change: fn(&mut GrantCopy)| {
        let mut request = good;
        change(&mut request);
        request
    };
    for (request, status) in [
        (with(|r| r.source.offset = 4089), gntst::BAD_COPY_ARG),
        (with(|r| r.dest.offset = 4089), gntst::BAD_COPY_ARG),
        (with(|r| r.len = 0xffff), gntst::BAD_COPY_ARG),
        (with(|r| r.source.domid = 0), gntst::BAD_DOMAIN),
        (with(|r| r.dest.domid = 1), gntst::BAD_DOMAIN),
        (with(|r| r.source.place = FRAMES), gntst::BAD_PAGE),
        (with(|r| r.dest.place = u64::MAX), gntst::BAD_PAGE),
        (with(|r| r.dest.place = L1), gntst::BAD_PAGE),
        (with(|r| r.flags = COPY_SOURCE_GREF), gntst::PERMISSION_DENIED),
        (with(|r| r.flags = COPY_DEST_GREF), gntst::PERMISSION_DENIED),
    ] {
        assert_eq!(copy(&mut guest, &request), status, "{request:?}");
    }
}

#[test]
fn a_back_end_uses_a_grant() {
    let guest = Guest::new();
    grant(&guest, 9, gtf::PERMIT_ACCESS, 0, FRAME);
    let writer = guest.domain.use_grant(9, 0, true).unwrap();
    assert_eq!(writer.address().0, FREE * PAGE_SIZE);
    assert!(writer.is_writable());
    assert_eq!(flags(&guest, 9), gtf::PERMIT_ACCESS | gtf::READING | gtf::WRITING);
    let reader = guest.domain.use_grant(9, 0, false).unwrap();
    drop(writer);
    assert_eq!(flags(&guest, 9), gtf::PERMIT_ACCESS | gtf::READING);
    drop(reader);
    assert_eq!(flags(&guest, 9), gtf::PERMIT_ACCESS);
}

#[test]
fn a_grant_is_used_as_it_was_given() {
    let guest = Guest::new();
    for (reference, flags, domid, frame) in [
        (9, 0, 0, FRAME),
        (10, gtf::PERMIT_ACCESS | gtf::SUB_PAGE, 0, FRAME),
        (11, 2, 0, FRAME),
        (12, gtf::PERMIT_ACCESS, 1, FRAME),
        (13, gtf::PERMIT_ACCESS, 0, END),
        (14, gtf::PERMIT_ACCESS, 0, u32::MAX),
        (15, gtf::PERMIT_ACCESS | gtf::READONLY, 0, FRAME),
    ] {
        grant(&guest, reference, flags, domid, frame);
        let error = guest.domain.use_grant(reference, 0, true).unwrap_err().to_string();
        assert!(error.contains(&format!("reference {reference} ")), "{error}");
    }
    assert!(guest.domain.use_grant(15, 0, false).is_ok());
    for reference in [512, u32::MAX] {
        assert!(guest.domain.use_grant(reference, 0, false).is_err(), "beyond the table");
    }
}

#[test]
fn unused_entries_are_exchanged() {
    let mut guest = Guest::new();
    grant(&guest, 8, gtf::PERMIT_ACCESS, 0, 1);
    grant(&guest, 9, gtf::PERMIT_ACCESS, 5, 2);
    let swap = |guest: &mut Guest, ref_a, ref_b| {
        let (result, at) =
            op(guest, gnttabop::SWAP_GRANT_REF, &SwapGrantRef { ref_a, ref_b, ..Default::default() });
        assert_eq!(result, Ok(0));
        guest.get::<SwapGrantRef>(at).status
    };
    assert_eq!(swap(&mut guest, 8, 9), gntst::OKAY);
    assert_eq!(guest.get::<GrantEntry>(Guest::va(place(&guest, 8))).domid, 5);
    assert_eq!(swap(&mut guest, 8, 512), gntst::BAD_GNTREF);
    let used = guest.domain.use_grant(9, 0, false).unwrap();
    assert_eq!(swap(&mut guest, 8, 9), gntst::GENERAL_ERROR);
    drop(used);
    assert_eq!(swap(&mut guest, 8, 9), gntst::OKAY);
}
