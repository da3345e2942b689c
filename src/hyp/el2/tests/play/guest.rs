//! Acts of guests, and who touches bytes.

use super::super::model::Wanted;
use super::super::*;
use super::{Play, Who, told};
use crate::hyp::el2::guest_call::{MEM_RELINQUISH, NO_POISON};
use crate::hyp::el2::invariants::trace::Kind;

impl Play {
    pub(super) fn convert(
        &mut self,
        cpu: usize,
        id: u64,
        gfn: u64,
        nr: u64,
    ) -> (Wanted, Option<Wanted>, Kind) {
        let is_android = self.model.profile.is_android();
        let nr = if is_android { nr } else { 0 };
        let wanted = self.vm_on(cpu).map(|vm| self.model.page_that(vm, gfn, id == MEM_UNSHARE));
        let got = self.world.el2.guest_call(cpu, [id, gfn << 12, nr, 0]);
        let (Some(vm), Some(wanted)) = (self.vm_on(cpu), wanted) else {
            return (told(got), Some(Err(Errno::EINVAL)), Kind::Refused);
        };
        if !self.model.vms[vm].protected {
            assert!(matches!(got, Ok(GuestAnswer::Exit(_))), "{got:?}");
            return (Ok(()), None, Kind::Refused);
        }
        // What the guest sees of an errno.
        let asks = is_android || id == MEM_SHARE;
        let fits = |wanted: Wanted| match (got, wanted) {
            (Ok(GuestAnswer::Resume([0, ..])), Ok(())) => true,
            (Ok(GuestAnswer::Fault(_)), Err(Errno::ENOENT)) => asks,
            (Ok(GuestAnswer::WantsSplit(_)), Err(Errno::E2BIG)) => asks,
            (Ok(INVALID), Err(Errno::ENOENT | Errno::E2BIG)) => !asks,
            (Ok(INVALID), Err(_)) => true,
            _ => false,
        };
        assert!(nr > 1 || fits(wanted), "{got:x?}, and it is {wanted:?}");
        match got {
            Ok(GuestAnswer::Resume([0, nr_done, ..])) => {
                assert!(nr_done <= nr.max(1) && (nr_done > 0) == is_android, "{nr_done}");
                self.model.show(vm, gfn, nr_done.max(1), id == MEM_SHARE);
                (Ok(()), None, Kind::Done)
            }
            _ => (Err(Errno::EINVAL), None, Kind::Refused),
        }
    }

    pub(super) fn give_up(
        &mut self,
        cpu: usize,
        gfn: u64,
        flags: u64,
    ) -> (Wanted, Option<Wanted>, Kind) {
        let vm = self.vm_on(cpu).filter(|&vm| self.model.vms[vm].protected);
        let got = self.world.el2.guest_call(cpu, [MEM_RELINQUISH, gfn << 12, 0, flags]);
        let (Some(vm), true) = (vm, self.model.profile.is_android()) else {
            assert!(matches!(got, Ok(GuestAnswer::Exit(_)) | Err(Errno::EINVAL)), "{got:?}");
            return (Ok(()), None, Kind::Refused);
        };
        match (got, self.model.page_that(vm, gfn, false)) {
            (Ok(DONE), Ok(())) => {
                self.model.lose(vm, gfn);
                let kind = if flags == NO_POISON { Kind::GivenUpAsItWas } else { Kind::Done };
                (Ok(()), None, kind)
            }
            (Ok(DONE), Err(Errno::ENOENT))
            | (Ok(GuestAnswer::WantsSplit(_)), Err(Errno::E2BIG))
            | (Ok(INVALID), Err(Errno::EPERM | Errno::EHWPOISON)) => (Ok(()), None, Kind::Refused),
            (got, wanted) => panic!("{got:x?}, and it is {wanted:?}"),
        }
    }

    pub(super) fn touch(
        &mut self,
        who: Who,
        cpu: usize,
        pfn: u64,
        stores: bool,
    ) -> (Wanted, Option<Wanted>, Kind) {
        let (at, pfn_of) = (Pa::new(pfn << 12), Pfn::new(pfn));
        let mut buf = [0; 4];
        let bytes = if stores { Bytes::Store(&[0x11; 4]) } else { Bytes::Load(&mut buf) };
        let el2 = &self.world.el2;
        let reached = |is_ok| match is_ok {
            true => (Ok(()), None, Kind::HostReached(pfn_of)),
            false => (Err(Errno::EFAULT), None, Kind::Refused),
        };
        match who {
            Who::User => reached(el2.user(cpu, at, bytes).is_ok()),
            Who::Uaccess => reached(el2.uaccess(cpu, at, bytes).is_ok()),
            Who::Device => {
                let done = el2.dma(at, bytes).is_ok();
                let may = self.model.dma.contains_key(&pfn);
                assert!(!self.model.profile.is_android() || done == may, "a device at {pfn:#x}");
                (Ok(()), None, Kind::DeviceStored)
            }
            Who::Kernel => match el2.kernel_alias(cpu, at, bytes) {
                KernelOutcome::Done => reached(true),
                KernelOutcome::DoneAfterReclaim => {
                    assert_eq!(self.model.forced(pfn), Ok(()), "{pfn:#x} was destroyed");
                    self.model.destroy(pfn);
                    (Ok(()), None, Kind::HostDestroyed(pfn_of))
                }
                KernelOutcome::Oops | KernelOutcome::Stuck => reached(false),
            },
        }
    }

    pub(super) fn vcpu_touch(
        &mut self,
        cpu: usize,
        gfn: u64,
        stores: bool,
    ) -> (Wanted, Option<Wanted>, Kind) {
        let mut buf = [0; 4];
        let ink = [self.ink; 4];
        let bytes = if stores { Bytes::Store(&ink) } else { Bytes::Load(&mut buf) };
        let got = self.world.el2.vcpu(cpu, Ipa::new(gfn << 12), bytes);
        let Some(vm) = self.vm_on(cpu) else {
            return (got.map_err(|_| Errno::EINVAL), Some(Err(Errno::EINVAL)), Kind::Refused);
        };
        let vm = &self.model.vms[vm];
        match got {
            Ok(()) => assert!(vm.piece(gfn).is_some(), "nothing is at {gfn:#x}"),
            // Without the right to write there is a fault too.
            Err(stop) => {
                assert!(matches!(stop, GuestStop::Fault(_)), "{stop:?}");
                assert!(vm.piece(gfn).is_none() || !vm.protected, "{gfn:#x} is there");
                if vm.is_poisoned(gfn) {
                    // 27: the host learns why.
                    assert_eq!(self.call(cpu, HostCall::VcpuInPoisonFault, [0; 4]), Ok(()));
                    assert_eq!(self.world.on(cpu, HostCall::VcpuInPoisonFault, [0; 4]), Ok(1));
                }
            }
        }
        (Ok(()), None, if got.is_ok() { Kind::GuestStored } else { Kind::Refused })
    }
}
