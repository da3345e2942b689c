//! What the scenarios of pkvm-oracle cannot see: that nothing is lost.

use super::*;
use crate::addr::Ipa;
use crate::hyp::MemslotId;

const BASE: Ipa = Ipa::new(0x8000_0000);

fn place(memory: MemoryId, page: u64) -> Place {
    Place { memory, page, offset: 0 }
}

/// A VM with four pages of a backing and one vCPU.
fn guest(linux: &mut Linux, kind: VmKind, backing: Backing) -> (MemoryId, VmId, VcpuId) {
    let memory = linux.map(backing, 4, PageKind::Base).unwrap();
    let vm = linux.create_vm(kind);
    let slot = Slot {
        ipa: BASE,
        memory,
        first_page: 0,
        nr_pages: 4,
        access: SlotAccess::ReadWrite,
        log: SlotLog::None,
    };
    linux.set_slot(vm, MemslotId::from_u16(0).unwrap(), slot).unwrap();
    let vcpu = linux.create_vcpu(vm, VcpuNumber(0)).unwrap();
    (memory, vm, vcpu)
}

#[test]
fn the_end_of_a_vm_gives_back_what_it_took() {
    for kind in [VmKind::Protected, VmKind::Plain] {
        for backing in [Backing::Anonymous, Backing::Shared, Backing::Memfd] {
            let mut linux = Linux::boot().unwrap();
            let nr_kernel_free = linux.frames.nr_kernel_free();
            for nr_before in 0..3 {
                let (memory, vm, vcpu) = guest(&mut linux, kind, backing);
                for page in 0..3 {
                    let at = Ipa::new(BASE.get() + page * 4096);
                    assert_eq!(linux.run(vcpu, Some(GuestAct::Store(at, 0x22))), Ran::Done);
                }
                linux.discard(place(memory, 0)).unwrap();
                linux.alias_load_u8(place(memory, 1), Alias::ProcessVm).unwrap();
                linux.close_vm(vm);
                linux.close_vcpu(vcpu);
                (0..4).for_each(|page| linux.unmap(place(memory, page)));
                assert_eq!(linux.locked_pages(), 0);
                assert_eq!(linux.frames.nr_kernel_free(), nr_kernel_free);
                assert_eq!(linux.check(), Vec::<String>::new());
                // Files keep their pages, and each VM's program stays mapped.
                let file = if backing == Backing::Anonymous { 0 } else { 3 };
                assert_eq!(linux.frames.nr_held(), (nr_before + 1) * (file + 1));
            }
        }
    }
}

#[test]
fn what_is_not_there_is_an_error() {
    let mut linux = Linux::boot().unwrap();
    let (memory, vm, vcpu) = guest(&mut linux, VmKind::Protected, Backing::Memfd);
    let unmapped = Raised { signal: UserSignal::Segv, code: 1 };
    for place in [
        place(memory, 4),
        place(memory, u64::MAX),
        place(MemoryId(77), 0),
        Place { memory, page: 0, offset: 4096 },
        Place { memory, page: 0, offset: u64::MAX },
    ] {
        assert_eq!(linux.load_u8(place), Err(unmapped));
        assert_eq!(linux.store_u8(place, 1), Err(unmapped));
        assert_eq!(linux.fork_load_u8(place), Err(unmapped));
        assert_eq!(linux.copy_out_u8(place), Err(Errno::EFAULT));
        assert_eq!(linux.copy_in_u8(place, 1), Err(Errno::EFAULT));
        for alias in [Alias::ProcessVm, Alias::ProcMem, Alias::Splice, Alias::File] {
            assert!(linux.alias_load_u8(place, alias).is_err());
            assert!(linux.alias_store_u8(place, alias, 1).is_err());
        }
        assert!(linux.punch(place).is_err());
        linux.unmap(place);
    }
    let slot = Slot {
        ipa: BASE,
        memory,
        first_page: u64::MAX,
        nr_pages: u64::MAX,
        access: SlotAccess::ReadWrite,
        log: SlotLog::None,
    };
    let number = MemslotId::from_u16(1).unwrap();
    assert_eq!(linux.set_slot(vm, number, slot), Err(Errno::EINVAL));
    let slot = Slot { ipa: Ipa::new(0x9000_0000), nr_pages: 2, ..slot };
    linux.set_slot(vm, number, slot).unwrap();
    let act = GuestAct::Load(Ipa::new(0x9000_1000));
    assert_eq!(linux.run(vcpu, Some(act)), Ran::Failed(Errno::EFAULT));
    assert_eq!(linux.map(Backing::Anonymous, 0, PageKind::Base), Err(Errno::EINVAL));
    assert_eq!(linux.map(Backing::Anonymous, u64::MAX, PageKind::Base), Err(Errno::ENOMEM));
    assert_eq!(linux.run(VcpuId(77), None), Ran::Nothing);
    linux.close_vm(VmId(77));
    linux.close_vcpu(VcpuId(77));
}
