//! What EL2 remembers of what a host names: no more than what the host shows it, and what it gives.

use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::hyp::kernel::{Calls, KernelPages};

#[test]
fn naming_structures_costs_nothing() {
    let world = World::new();
    let guest = world.vm(true);
    let nr = || world.el2.machine().structs.nr();
    let before = nr();
    let kvm = world.shared_page();
    let (vm, pgd) = (world.pages(nr_vm_pages(1)), world.pages(nr_pgd_pages()));
    let frames = world.pages(nr_vcpu_pages());
    for at in kvm..kvm + 1024 {
        // Zeroes are what is there: no vCPUs, and a vCPU's number that is taken.
        assert_eq!(world.call(HostCall::InitVm, [at, vm, pgd, 0]), Err(Errno::EINVAL));
        let vcpu = world.call(HostCall::InitVcpu, [guest.handle, at, frames, 0]);
        assert_eq!(vcpu, Err(Errno::EINVAL));
    }
    assert_eq!(nr(), before);
    world.sound();
}

#[test]
fn structures_lie_beside_each_other_in_pages_that_are_shown() {
    let world = World::new();
    let nr = || world.el2.machine().structs.nr();
    let (one, two) = (world.pages(2), world.page());
    world.el2.host_struct(one).lock().handle = 7;
    assert_eq!(nr(), 0, "EL2 is not shown it");
    for page in [one, one + 4096] {
        world.call(HostCall::ShareHyp, [page >> 12, 0, 0, 0]).unwrap();
    }
    assert_eq!(world.el2.host_struct(one).lock().handle, 0);
    for at in one..one + 4096 {
        world.el2.host_struct(at).lock().handle = at;
    }
    assert_eq!(nr(), 1, "each overwrites those before it");
    world.el2.host_struct(one).lock().handle = 7;
    assert_eq!(nr(), 2, "no byte of theirs is the same");
    assert_eq!(world.el2.host_struct(one + 4095).lock().handle, one + 4095);
    assert_eq!(world.el2.host_struct(two).lock().handle, 0);
    world.call(HostCall::UnshareHyp, [(one >> 12) + 1, 0, 0, 0]).unwrap();
    assert_eq!(nr(), 1, "the last lay in both pages");
    world.call(HostCall::UnshareHyp, [one >> 12, 0, 0, 0]).unwrap();
    assert_eq!(nr(), 0);
}

#[test]
fn vms_leave_nothing_behind() {
    let world = World::new();
    for _ in 0..20 {
        let guest = world.running(true);
        world.put(0);
        world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
        world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
        let said = world.el2.host_struct(guest.kvm);
        let returned = std::mem::take(&mut said.lock().returned);
        world.free.lock().extend(returned.iter().map(|at| at >> 12));
        for page in [guest.kvm, guest.vcpus[0], guest.vcpus[1]] {
            world.call(HostCall::UnshareHyp, [page >> 12, 0, 0, 0]).unwrap();
            world.free.lock().push(page >> 12);
        }
        assert_eq!(world.el2.machine().structs.nr(), 0);
    }
}

#[test]
fn what_a_vcpu_reads_is_what_the_host_writes_later() {
    let world = World::new();
    let handle = world.call(HostCall::ReserveVm, [0; 4]).unwrap();
    let kvm = world.shared_page();
    {
        let said = world.el2.host_struct(kvm);
        let mut said = said.lock();
        (said.handle, said.nr_vcpus, said.protected) = (handle, 1, true);
    }
    let (vm, pgd) = (world.pages(nr_vm_pages(1)), world.pages(nr_pgd_pages()));
    world.call(HostCall::InitVm, [kvm, vm, pgd, 0]).unwrap();
    let (at, frames) = (world.shared_page(), world.pages(nr_vcpu_pages()));
    // The host has not written there: a vCPU's number 0.
    world.call(HostCall::InitVcpu, [handle, at, frames, 0]).unwrap();
    let guest = Guest { handle, kvm, vcpus: [at, at] };
    world.load(0, guest, 0);
    assert_eq!(world.donate(GUEST, 0), Err(Errno::ENOMEM));
    world.top_up(guest, 0, 8);
    assert_eq!(world.donate(GUEST, 0), Ok(0));
    world.sound();
}

#[test]
fn a_page_that_many_vms_keep_is_listed_once() {
    let world = World::new();
    for _ in 0..300 {
        let guest = world.running(false);
        world.share(GUEST, 0, 1).unwrap();
        world.put(0);
        world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
        world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
        let returned = std::mem::take(&mut world.el2.host_struct(guest.kvm).lock().returned);
        world.free.lock().extend(returned.iter().map(|at| at >> 12));
        for page in [guest.kvm, guest.vcpus[0], guest.vcpus[1]] {
            let said = world.el2.host_struct(page);
            let unused = std::mem::take(&mut said.lock().memcache);
            world.call(HostCall::UnshareHyp, [page >> 12, 0, 0, 0]).unwrap();
            world.free.lock().extend(unused.into_iter().chain([page]).map(|at| at >> 12));
        }
    }
    world.sound();
    assert_eq!(world.el2.orphans(), [Pfn::new(GUEST)]);
    assert_eq!(world.el2.host.lock().page(Pfn::new(GUEST)).nr_guests, 300);
}

#[test]
fn a_vm_ends_in_pieces_and_all_is_sound_between_them() {
    let world = World::new();
    let guest = world.running(true);
    for nth in 0..40 {
        world.top_up(guest, 0, 2);
        world.donate(GUEST + nth, nth << 18).unwrap();
    }
    world.put(0);
    let x = [guest.handle, 0, 0, 0];
    world.call(HostCall::StartTeardownVm, x).unwrap();
    let nr_pieces = world.el2.in_pieces(guest.handle as u16, |nr_pages| {
        assert!(nr_pages <= 20, "{nr_pages}");
        world.sound();
        world.refused(HostCall::FinalizeTeardownVm, x, Errno::EINVAL);
        world.refused(HostCall::StartTeardownVm, x, Errno::EINVAL);
        world.refused(HostCall::ForceReclaimGuestPage, [GUEST << 12, 0, 0, 0], Errno::EAGAIN);
        let other = world.call(HostCall::ReserveVm, [0; 4]).unwrap();
        assert_ne!(other, guest.handle, "it is not free yet");
        world.call(HostCall::UnreserveVm, [other, 0, 0, 0]).unwrap();
    });
    assert!(nr_pieces > 4, "{nr_pieces}");
    assert_eq!(world.el2.orphans().len(), 40);
    assert_eq!(world.call(HostCall::ReserveVm, [0; 4]), Ok(guest.handle));
    world.sound();
}

/// A kernel's memory that sees whether somebody else can lock a structure while a page is taken.
struct Watched<'a, 'scope, 'env> {
    world: &'env World,
    scope: &'scope std::thread::Scope<'scope, 'env>,
    at: u64,
    nr_locked: &'a mut usize,
}

impl KernelPages for Watched<'_, '_, '_> {
    fn take(&mut self, nr: u64) -> Result<u64, Errno> {
        let (done, answer) = mpsc::channel();
        let (world, at) = (self.world, self.at);
        self.scope.spawn(move || {
            drop(world.el2.host_struct(at).lock());
            done.send(()).ok();
        });
        *self.nr_locked += usize::from(answer.recv_timeout(Duration::from_secs(10)).is_ok());
        Ok(self.world.pages(nr))
    }

    fn give(&mut self, at: u64) {
        self.world.free.lock().push(at >> 12);
    }
}

#[test]
fn no_page_is_taken_while_a_structure_is_locked() {
    let world = World::new();
    let guest = world.vm(true);
    let at = guest.vcpus[0];
    let mut nr_locked = 0;
    std::thread::scope(|scope| {
        let mut pages = Watched { world: &world, scope, at, nr_locked: &mut nr_locked };
        let mut calls = Calls { el2: &world.el2, cpu: 0, pages: &mut pages };
        calls.top_up(at, 3).unwrap();
        calls.top_up(at, 2).unwrap();
    });
    assert_eq!(nr_locked, 3);
    let said = world.el2.host_struct(at);
    let said = said.lock();
    assert_eq!((said.nr_memcache, said.memcache.len()), (3, 3));
}
