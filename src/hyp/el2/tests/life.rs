//! VMs and vCPUs: made, loaded, torn down.

use super::*;
use crate::hyp::el2::vm::{FIRST_HANDLE, MAX_VMS};

#[test]
fn handles_are_reserved_given_up_and_used_up() {
    let world = World::new();
    let reserve = || world.call(HostCall::ReserveVm, [0; 4]);
    let all: Vec<_> = (0..MAX_VMS).map(|_| reserve().unwrap()).collect();
    assert_eq!(all[0], u64::from(FIRST_HANDLE));
    assert_eq!(reserve(), Err(Errno::ENOMEM));
    for handle in [0, FIRST_HANDLE - 1, FIRST_HANDLE + 255, u16::MAX] {
        assert_eq!(world.call(HostCall::UnreserveVm, [handle.into(), 0, 0, 0]), Ok(0));
    }
    assert_eq!(reserve(), Err(Errno::ENOMEM));
    // A handle has 16 bits; what is above them is not looked at.
    world.call(HostCall::UnreserveVm, [1 << 16 | all[7], 0, 0, 0]).unwrap();
    assert_eq!(reserve(), Ok(all[7]));
}

#[test]
pub(super) fn a_vm_is_made_of_what_checks_let_through_in_order() {
    let world = World::new();
    let handle = world.call(HostCall::ReserveVm, [0; 4]).unwrap();
    let kvm = world.page();
    let says = |handle, nr_vcpus| {
        let said = world.el2.host_struct(kvm);
        let mut said = said.lock();
        (said.handle, said.nr_vcpus, said.protected) = (handle, nr_vcpus, true);
    };
    let (vm, pgd) = (world.pages(nr_vm_pages(1)), world.pages(nr_pgd_pages()));
    let init = |x: [u64; 4], errno| world.refused(HostCall::InitVm, x, errno);
    init([kvm, vm, pgd, 0], Errno::EPERM); // not shown to EL2
    init([u64::MAX, vm, pgd, 0], Errno::EPERM);
    init([(KERNEL << 12) - 1, vm, pgd, 0], Errno::EINVAL); // of two regions
    world.call(HostCall::ShareHyp, [kvm >> 12, 0, 0, 0]).unwrap();
    init([kvm, vm, pgd, 0], Errno::EINVAL); // no vCPU
    says(0, 1);
    init([kvm, vm, pgd, 0], Errno::EINVAL);
    says(1 << 16 | handle, 1);
    init([kvm, vm, pgd, 0], Errno::EINVAL);
    says(handle, u64::MAX);
    init([kvm, vm, pgd, 0], Errno::ENOMEM);
    says(handle + 1, 1);
    init([kvm, vm + 1, pgd, 0], Errno::ENOMEM); // memory before the handle
    init([kvm, kvm, pgd, 0], Errno::ENOMEM);
    init([kvm, vm, vm, 0], Errno::ENOMEM);
    init([kvm, vm, pgd, 0], Errno::EINVAL); // not reserved
    world.sound();
    says(handle, 1);
    world.call(HostCall::InitVm, [kvm, vm, pgd, 0]).unwrap();
    world.sound();
    let (vm, pgd) = (world.pages(nr_vm_pages(1)), world.pages(nr_pgd_pages()));
    init([kvm, vm, pgd, 0], Errno::EINVAL); // twice
    world.refused(HostCall::UnshareHyp, [kvm >> 12, 0, 0, 0], Errno::EBUSY);
}

#[test]
pub(super) fn a_vcpu_is_made_of_what_checks_let_through_in_order() {
    let world = World::new();
    let guest = world.vm(true);
    let (at, frames) = (world.page(), world.pages(nr_vcpu_pages()));
    let init = |handle: u64, at, frames, errno| {
        world.refused(HostCall::InitVcpu, [handle, at, frames, 0], errno);
    };
    init(0, at, frames + 8, Errno::ENOMEM);
    init(0, at, guest.kvm, Errno::ENOMEM);
    init(0, at, frames, Errno::ENOENT);
    init(guest.handle + 1, at, frames, Errno::ENOENT);
    init(guest.handle, at, frames, Errno::EBUSY);
    world.call(HostCall::ShareHyp, [at >> 12, 0, 0, 0]).unwrap();
    for idx in [0, 1, 2, u64::MAX] {
        // Taken, or too large.
        world.el2.host_struct(at).lock().vcpu_idx = idx;
        init(guest.handle, at, frames, Errno::EINVAL);
    }
    world.sound();
}

#[test]
fn a_vcpu_is_loaded_once_and_silently_not_twice() {
    let world = World::new();
    let guest = world.vm(true);
    let run = |cpu, at| world.on(cpu, HostCall::VcpuRun, [at, 0, 0, 0]);
    assert_eq!(run(0, guest.vcpus[0]), Err(Errno::EINVAL));
    world.load(0, guest, 0);
    assert_eq!(run(0, guest.vcpus[0]), Ok(0));
    assert_eq!(run(0, guest.vcpus[1]), Err(Errno::EINVAL));
    world.load(0, guest, 1); // the CPU has one
    assert_eq!(run(0, guest.vcpus[0]), Ok(0));
    world.load(1, guest, 0); // the vCPU is there already
    assert_eq!(run(1, guest.vcpus[0]), Err(Errno::EINVAL));
    world.load(1, guest, 7);
    world.load(NR_CPUS, guest, 1);
    world.on(1, HostCall::VcpuLoad, [0x2000, 1, 0, 0]).unwrap();
    assert_eq!(run(1, guest.vcpus[1]), Err(Errno::EINVAL));
    world.on(1, HostCall::VcpuLoad, [guest.handle, 1 << 32 | 1, 0, 0]).unwrap();
    assert_eq!(run(1, guest.vcpus[1]), Ok(0), "a vCPU's number has 32 bits");
    world.sound();
    world.put(0);
    world.put(0);
    world.load(2, guest, 0);
    assert_eq!(run(2, guest.vcpus[0]), Ok(0));
    world.sound();
}

#[test]
pub(super) fn teardown_goes_in_one_order_and_gives_everything_back() {
    let world = World::new();
    let before = Snapshot::of(&world.el2);
    let guest = world.running(true);
    let x = [guest.handle, 0, 0, 0];
    for nth in 0..40 {
        // Far apart, so that there are many tables.
        world.top_up(guest, 0, 2);
        world.donate(GUEST + nth, nth << 18 | nth << 9).unwrap();
    }
    world.store(0, b"mine").unwrap();
    world.sound();
    world.refused(HostCall::StartTeardownVm, x, Errno::EINVAL);
    world.put(0);
    world.refused(HostCall::FinalizeTeardownVm, x, Errno::EINVAL);
    world.refused(HostCall::StartTeardownVm, [guest.handle + 1, 0, 0, 0], Errno::EINVAL);
    world.call(HostCall::StartTeardownVm, x).unwrap();
    world.refused(HostCall::StartTeardownVm, x, Errno::EINVAL);
    world.load(0, guest, 0);
    world.refused(HostCall::VcpuRun, [guest.vcpus[0], 0, 0, 0], Errno::EINVAL);
    for nth in 0..40 {
        let x = [guest.handle, nth << 18 | nth << 9, 0, 0];
        world.call(HostCall::ReclaimDyingGuestPage, x).unwrap();
    }
    world.call(HostCall::FinalizeTeardownVm, x).unwrap();
    world.refused(HostCall::FinalizeTeardownVm, x, Errno::EINVAL);
    world.sound();
    assert_eq!(world.el2.orphans(), []);
    let said = world.el2.host_struct(guest.kvm);
    let returned = said.lock().returned.clone();
    assert!(returned.len() > 40, "tables, metadata, the rest of the memcache: {}", returned.len());
    for page in [guest.kvm, guest.vcpus[0], guest.vcpus[1]] {
        world.call(HostCall::UnshareHyp, [page >> 12, 0, 0, 0]).unwrap();
    }
    before.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(world.el2.incidents.counts().nr_orphaned, 0);
    // The handle is free, and remembers nothing.
    let next = world.running(true);
    assert_eq!(next.handle, guest.handle);
    assert!(matches!(world.read(0), Err(GuestStop::Fault(_))));
}

#[test]
fn pages_that_nobody_asks_back_are_orphans_for_good() {
    let world = World::new();
    let guest = world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    world.donate(GUEST + 1, 0x11).unwrap();
    assert_eq!(world.hvc(MEM_SHARE, 0x11), DONE);
    world.put(0);
    world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    assert_eq!(world.el2.orphans(), [Pfn::new(GUEST), Pfn::new(GUEST + 1)]);
    assert_eq!(world.el2.incidents.counts().nr_orphaned, 2);
    world.sound();
    let force = [GUEST << 12, 0, 0, 0];
    world.refused(HostCall::ForceReclaimGuestPage, force, Errno::EAGAIN);
    let outcome = world.el2.kernel_alias(0, Pa::new(GUEST << 12), Bytes::Store(b"x"));
    assert_eq!((outcome, world.el2.incidents.counts().nr_stuck), (KernelOutcome::Stuck, 1));
    // A new VM has the handle, and not the page.
    let next = world.running(true);
    assert_eq!(next.handle, guest.handle);
    world.refused(HostCall::ForceReclaimGuestPage, force, Errno::EPERM);
    world.refused(HostCall::DonateGuest, [GUEST, 0x10, 0, 0], Errno::EPERM);
    world.sound();
}

#[test]
fn the_memcache_takes_what_is_the_hosts_and_nothing_else() {
    let world = World::new();
    let guest = world.vm(true);
    world.load(0, guest, 0);
    let list = |nr, pages: &[u64]| {
        let said = world.el2.host_struct(guest.vcpus[0]);
        let mut said = said.lock();
        (said.nr_memcache, said.memcache) = (nr, pages.to_vec());
    };
    let (one, two) = (world.page(), world.page());
    for (nr, pages) in [
        (1, vec![]),
        (u64::MAX, vec![]),
        (1, vec![guest.kvm]),
        (1, vec![DEVICE << 12]),
        (1, vec![u64::MAX]),
        (1, vec![CARVEOUT << 12]),
    ] {
        list(nr, &pages);
        world.refused(HostCall::DonateGuest, [GUEST, 0x10, 0, 0], Errno::ENOMEM);
    }
    // The same page twice: the first time it is the host's.
    list(2, &[one, one]);
    assert_eq!(world.donate(GUEST, 0x10), Err(Errno::ENOMEM));
    assert_eq!(world.host_state(one >> 12), State::NoPage, "what was taken stays taken");
    world.sound();
    list(2, &[two]);
    assert_eq!(world.donate(GUEST, 0x10), Ok(0), "two are enough");
    world.sound();
}

#[test]
fn a_page_for_tables_is_cleared_before_it_is_one() {
    let world = World::new();
    let guest = world.vm(true);
    world.load(0, guest, 0);
    for nth in 0..4 {
        world.user_store(GUEST + nth, b"host").unwrap();
    }
    {
        let said = world.el2.host_struct(guest.vcpus[0]);
        let mut said = said.lock();
        (said.nr_memcache, said.memcache) = (3, (1..4).map(|nth| (GUEST + nth) << 12).collect());
    }
    world.donate(GUEST, 0x10).unwrap();
    for nth in 1..4 {
        assert_eq!(world.bytes(GUEST + nth), [0; 4096], "{nth}");
    }
    assert_eq!(world.read(0x10), Ok(*b"host"));
    world.sound();
}
