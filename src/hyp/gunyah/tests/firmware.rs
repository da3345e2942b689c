//! Firmware: who gives it, where a VM is to have it, and what is there when it starts.

use super::super::World;
use super::super::error::RmError::*;
use super::super::rm::Vmid;
use super::super::rm::message::{Create, Transfer};
use super::super::rm::vm::Image;
use super::full::*;
use super::*;

const C: Vmid = Vmid(0x90);
const ANDROID: u32 = 2;
/// The image of the VM: three pages.
const MEMORY: u64 = RAM + 0x60;

/// A gift to the resource manager, with bytes, and a VM's image.
fn scene() -> (Full, u32, Image) {
    let full = Full::new();
    assert!(full.store(HOST, RAM, b"firm") && full.store(HOST, RAM + 1, b"ware"));
    let gift = full.create(HOST, &Create { label: 0, ..donate(Vmid::RM, &[(RAM, 2)]) }).unwrap();
    let create = Create { label: 0, ..lend(&[(C, 7)], &[(MEMORY, 3)]) };
    for nth in 0..3 {
        assert!(full.store(HOST, MEMORY + nth, b"host"));
    }
    let handle = full.create(HOST, &create).unwrap();
    (full, gift, Image { handle, ipa: IMAGE_AT, unsanitized: true })
}

#[test]
fn each_error_in_its_order() {
    let (full, gift, image) = scene();
    let other = full.create(HOST, &lend(&[(A, 7)], &[(RAM + 8, 1)])).unwrap();
    full.gunyah.with(|World { hyp, rm, .. }| {
        assert_eq!(rm.load_firmware(hyp, A, 9, 999, (1, 0)), Err(Denied));
        for auth in [0, 1, 3] {
            let answer = rm.load_firmware(hyp, HOST, auth, 999, (1, 0));
            assert_eq!(answer, Err(ArgumentInvalid));
        }
        for handle in [999, image.handle] {
            let answer = rm.load_firmware(hyp, HOST, ANDROID, handle, (1, 0));
            assert_eq!(answer, Err(HandleInvalid));
        }
        for bytes in [(0, 0), (1, 8), (PAGE, PAGE), (0, 2 * PAGE + 1), (0, u64::MAX)] {
            let answer = rm.load_firmware(hyp, HOST, ANDROID, gift, bytes);
            assert_eq!(answer, Err(ArgumentInvalid));
        }
        let set = |rm: &mut super::super::rm::Rm, client, vmid, handle, bytes| {
            rm.set_firmware_mem(client, vmid, handle, bytes)
        };
        assert_eq!(set(rm, A, C, 999, (1, !0)), Err(NoResource));
        rm.allocate(HOST, C).unwrap();
        assert_eq!(set(rm, A, C, 999, (1, !0)), Err(Denied));
        assert_eq!(set(rm, HOST, C, 999, (1, !0)), Err(VmState));
        // A is vouched for by nobody's firmware, but does not wait for one either.
        assert_eq!(set(rm, HOST, A, 999, (1, !0)), Err(VmState));
        rm.config_image(hyp, HOST, C, ANDROID, image).unwrap();
        assert_eq!(set(rm, HOST, C, 999, (1, !0)), Err(Denied), "there is none");
        rm.load_firmware(hyp, HOST, ANDROID, gift, (0, PAGE + 4)).unwrap();
        assert_eq!(rm.load_firmware(hyp, HOST, ANDROID, 999, (1, 0)), Err(Busy));
        for handle in [999, other] {
            assert_eq!(set(rm, HOST, C, handle, (1, !0)), Err(MemInvalid));
        }
        for bytes in [(1, !0), (0, 3 * PAGE + 1), (3 * PAGE, 1)] {
            assert_eq!(set(rm, HOST, C, image.handle, bytes), Err(ArgumentInvalid));
        }
        assert_eq!(set(rm, HOST, C, image.handle, (8, PAGE)), Ok(()));
        rm.init_vm(hyp, HOST, C).unwrap();
        assert_eq!(set(rm, HOST, C, image.handle, (8, PAGE)), Err(VmState));
        // While firmware may come, nobody starts with it; and not in less memory than it needs.
        assert_eq!(rm.start_vm(HOST, C), Err(Denied));
        assert_eq!(rm.end_loading(A), Err(Denied));
        rm.end_loading(HOST).unwrap();
        assert_eq!(rm.end_loading(HOST), Err(Denied));
        assert_eq!(rm.load_firmware(hyp, HOST, ANDROID, gift, (0, 4)), Err(Denied));
        assert_eq!(rm.start_vm(HOST, C), Err(MemInvalid));
        assert_eq!(rm.vms[&C].state as u8, 2, "and it is as it was");
    });
    full.sound();
}

/// Does it all, and says what the VM finds in three pages from where it has its firmware.
fn started(at: u64, separate: bool) -> (Full, Vec<[u8; 4]>) {
    let (full, gift, image) = scene();
    let own = Create { label: 0, ..lend(&[(C, 7)], &[(RAM + 0x80, 3)]) };
    let handle = if separate { full.create(HOST, &own).unwrap() } else { image.handle };
    full.gunyah.with(|World { hyp, rm, .. }| {
        rm.load_firmware(hyp, HOST, ANDROID, gift, (0, PAGE + 4)).unwrap();
        rm.end_loading(HOST).unwrap();
        rm.allocate(HOST, C).unwrap();
        rm.config_image(hyp, HOST, C, ANDROID, image).unwrap();
        rm.set_firmware_mem(HOST, C, handle, (at, 3 * PAGE - at)).unwrap();
        rm.init_vm(hyp, HOST, C).unwrap();
        rm.start_vm(HOST, C).unwrap();
    });
    full.sound();
    let first = if separate { 0 } else { IMAGE_AT / PAGE };
    let pages = (0..3).map(|nth| full.load(C, first + nth).unwrap()).collect();
    (full, pages)
}

#[test]
fn a_vm_starts_with_the_firmware_and_zeroes_behind_it() {
    let (full, pages) = started(0, false);
    assert_eq!(pages, [*b"firm", *b"ware", [0; 4]]);
    assert_eq!(full.at(HOST, RAM), None, "what was given is the resource manager's");
    let (_, pages) = started(PAGE, false);
    assert_eq!(pages, [*b"host", *b"firm", *b"ware"], "and nothing before it");
    let (_, pages) = started(2, false);
    assert_eq!(pages, [*b"hofi", *b"\0\0wa", [0; 4]]);
}

#[test]
fn firmware_in_a_parcel_of_its_own_goes_back_cleared() {
    let (full, pages) = started(0, true);
    assert_eq!(pages, [*b"firm", *b"ware", [0; 4]]);
    assert_eq!(full.load(C, IMAGE_AT / PAGE), Some(*b"host"), "the image is as it was");
    full.reset(C);
    let lent = full.gunyah.with(|world| {
        let of = |parcel: &super::super::rm::Parcel| parcel.transfer == Transfer::Lend;
        let mut all = world.rm.parcels.iter().filter(|(_, parcel)| of(parcel));
        all.find(|(_, parcel)| parcel.regions[0].pfn.get() == RAM + 0x80).map(|(&handle, _)| handle)
    });
    full.reclaim(HOST, lent.unwrap(), 0).unwrap();
    assert_eq!(full.load(HOST, RAM + 0x80), Some([0; 4]));
    full.sound();
}
