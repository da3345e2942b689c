//! Hosts and guests that know what they have, and mostly do what could work: acts, what EL2 answers, what the model
//! says to that, and every rule after every act.

mod guest;

use std::collections::BTreeMap;

use super::model::{BLOCK, Model, Own, Vm, Wanted};
use super::*;
use crate::hyp::el2::host_struct::ListedPages;
use crate::hyp::el2::hostile::Flaw;
use crate::hyp::el2::invariants::trace::{Kind, Step};

pub(super) const NR_VMS: usize = 3;
const PLAY_CPUS: usize = 2;
/// Pages on a vCPU's list when it needs one.
const NR_MEMCACHE: u64 = 8;

/// Who touches a byte.
#[derive(Clone, Copy, Debug)]
pub(super) enum Who {
    User,
    Uaccess,
    Kernel,
    Device,
}

/// What somebody does. CPUs, VMs and runs of the secure world are told by number, whatever is there.
#[derive(Clone, Debug)]
pub(super) enum Act {
    Load {
        cpu: usize,
        vm: usize,
        idx: u64,
    },
    Put {
        cpu: usize,
    },
    Donate {
        cpu: usize,
        pfn: u64,
        gfn: u64,
        nr: u64,
    },
    DonateList {
        cpu: usize,
        list: Vec<(u64, u64, u64)>,
    },
    Lend {
        cpu: usize,
        pfn: u64,
        gfn: u64,
        nr: u64,
    },
    Unlend {
        vm: usize,
        gfn: u64,
        nr: u64,
    },
    Protect {
        vm: usize,
        gfn: u64,
    },
    Relax {
        cpu: usize,
        gfn: u64,
    },
    Show {
        cpu: usize,
        gfn: u64,
        nr: u64,
    },
    Hide {
        cpu: usize,
        gfn: u64,
        nr: u64,
    },
    GiveUp {
        cpu: usize,
        gfn: u64,
        flags: u64,
    },
    Split {
        cpu: usize,
        gfn: u64,
    },
    ShareHyp {
        pfn: u64,
    },
    UnshareHyp {
        pfn: u64,
    },
    FfaShare {
        pfn: u64,
    },
    FfaDonate {
        pfn: u64,
        nr: u64,
    },
    FfaReclaim {
        nth: usize,
    },
    MapDma {
        pfn: u64,
    },
    UnmapDma {
        pfn: u64,
    },
    Force {
        pfn: u64,
    },
    Die {
        vm: usize,
    },
    Reclaim {
        vm: usize,
        gfn: u64,
    },
    End {
        vm: usize,
    },
    /// Puts its vCPUs off, asks everything back, ends it.
    TearDown {
        vm: usize,
    },
    Touch {
        who: Who,
        cpu: usize,
        pfn: u64,
        stores: bool,
    },
    VcpuTouch {
        cpu: usize,
        gfn: u64,
        stores: bool,
    },
}

pub(super) struct Play {
    pub(super) world: World,
    pub(super) model: Model,
    pub(super) guests: Vec<Guest>,
    pub(super) loaded: [Option<(usize, u64)>; PLAY_CPUS],
    ffa: Vec<(u64, u64, u64)>,
    /// What a guest stores.
    pub(super) ink: u8,
    /// How the last act left everything.
    last: Option<Snapshot>,
    /// How often each kind of act was answered how.
    pub(super) answers: BTreeMap<String, u64>,
}

fn told<T>(result: Result<T, Errno>) -> Wanted {
    result.map(drop)
}

impl Play {
    pub(super) fn new(world: World, profile: Profile) -> Self {
        let guests: Vec<_> = [true, true, false].map(|protected| world.vm(protected)).into();
        let vms = [true, true, false].map(|protected| Vm { protected, ..Vm::default() }).into();
        let (frames, dma) = (BTreeMap::new(), BTreeMap::new());
        let model = Model { profile, frames, vms, dma };
        let (loaded, ffa) = ([None; PLAY_CPUS], Vec::new());
        Self { world, model, guests, loaded, ffa, ink: 0x11, last: None, answers: BTreeMap::new() }
    }

    /// How many runs the secure world has.
    pub(super) fn nr_ffa(&self) -> usize {
        self.ffa.len()
    }

    /// How many acts were not refused.
    pub(super) fn nr_done(&self) -> u64 {
        let done = self.answers.iter().filter(|(what, _)| what.ends_with(" Ok(())"));
        done.map(|(_, nr)| nr).sum()
    }

    fn vm_on(&self, cpu: usize) -> Option<usize> {
        self.loaded[cpu].map(|(vm, _)| vm)
    }

    /// So that the vCPU which a CPU has does not want for tables.
    fn feed(&self, cpu: usize) {
        let Some((vm, idx)) = self.loaded[cpu] else { return };
        let nr = self.world.el2.with_vcpu(cpu, |loaded| Ok(loaded.vcpu.memcache.len() as u64));
        if nr.unwrap_or(NR_MEMCACHE) < 6 {
            let said = self.world.el2.host_struct(self.guests[vm].vcpus[idx as usize]);
            let missing = NR_MEMCACHE - said.lock().memcache.len() as u64;
            self.world.top_up(self.guests[vm], idx as usize, missing);
        }
    }

    fn call(&self, cpu: usize, call: HostCall, x: [u64; 4]) -> Wanted {
        told(self.world.on(cpu, call, x))
    }

    /// Does it, and says what was answered, what should have been if that is known, and what kind of step it was.
    fn perform(&mut self, act: &Act) -> (Wanted, Option<Wanted>, Kind) {
        let refill = |answer: &Wanted| match answer {
            Ok(()) => Kind::Done,
            Err(_) => Kind::RefusedAfterRefill,
        };
        let plain = |answer: &Wanted| if answer.is_ok() { Kind::Done } else { Kind::Refused };
        match *act {
            Act::Load { cpu, vm, idx } => {
                let free = self.loaded[cpu].is_none() && !self.loaded.contains(&Some((vm, idx)));
                let wanted = free && !self.model.vms[vm].dying;
                self.world.load(cpu, self.guests[vm], idx);
                if wanted {
                    self.loaded[cpu] = Some((vm, idx));
                }
                let at = self.loaded[cpu].map(|(vm, idx)| self.guests[vm].vcpus[idx as usize]);
                let has = self.world.el2.with_vcpu(cpu, |loaded| Ok(loaded.vcpu.host_at));
                assert_eq!(has.ok(), at, "who is loaded");
                (Ok(()), None, Kind::Refused)
            }
            Act::Put { cpu } => {
                self.world.put(cpu);
                self.loaded[cpu] = None;
                (Ok(()), None, Kind::Refused)
            }
            Act::Donate { cpu, pfn, gfn, nr } => {
                let vm = self.vm_on(cpu);
                let nr = if self.model.profile.donates(BLOCK) { nr } else { 1 };
                let wanted = self.model.donated(vm, pfn, gfn, nr);
                let answer = self.call(cpu, HostCall::DonateGuest, [pfn, gfn, nr, 0]);
                if let (Ok(()), Some(vm)) = (answer, vm) {
                    self.model.gain(vm, pfn, gfn, nr);
                }
                (answer, Some(wanted), refill(&answer))
            }
            Act::DonateList { cpu, ref list } => self.donate_list(cpu, list),
            Act::Lend { cpu, pfn, gfn, nr } => {
                let vm = self.vm_on(cpu);
                let wanted = self.model.lent(vm, pfn, gfn, nr);
                let answer = self.call(cpu, HostCall::ShareGuest, [pfn, gfn, nr, RWX]);
                if let (Ok(()), Some(vm)) = (answer, vm) {
                    self.model.gain(vm, pfn, gfn, nr);
                }
                (answer, Some(wanted), refill(&answer))
            }
            Act::Unlend { vm, gfn, nr } => {
                let wanted = self.model.unlent(vm, gfn, nr);
                let x = [self.guests[vm].handle, gfn, nr, 0];
                let answer = self.call(0, HostCall::UnshareGuest, x);
                if answer.is_ok() {
                    self.model.lose(vm, gfn);
                }
                (answer, Some(wanted), plain(&answer))
            }
            Act::Protect { vm, gfn } => {
                let wanted = if self.model.vms[vm].protected { Err(Errno::EINVAL) } else { Ok(()) };
                let x = [self.guests[vm].handle, gfn, 1, 0];
                let answer = self.call(0, HostCall::WrprotectGuest, x);
                (answer, Some(wanted), Kind::Done)
            }
            Act::Relax { cpu, gfn } => {
                let vm = self.vm_on(cpu).map(|vm| &self.model.vms[vm]).filter(|vm| !vm.protected);
                let wanted = match vm.map(|vm| vm.piece(gfn)) {
                    None => Err(Errno::EINVAL),
                    Some(None) => Err(Errno::EAGAIN),
                    Some(Some(_)) => Ok(()),
                };
                (
                    self.call(cpu, HostCall::RelaxPermsGuest, [gfn, RWX, 0, 0]),
                    Some(wanted),
                    Kind::Done,
                )
            }
            Act::Show { cpu, gfn, nr } => self.convert(cpu, MEM_SHARE, gfn, nr),
            Act::Hide { cpu, gfn, nr } => self.convert(cpu, MEM_UNSHARE, gfn, nr),
            Act::GiveUp { cpu, gfn, flags } => self.give_up(cpu, gfn, flags),
            Act::Split { cpu, gfn } => {
                let vm = self.vm_on(cpu);
                let wanted = self.model.split(vm, gfn);
                let answer = self.call(cpu, HostCall::SplitGuest, [gfn, BLOCK, 0, 0]);
                if let (Ok(()), Some(vm)) = (answer, vm) {
                    self.model.cut(vm, gfn);
                }
                (answer, Some(wanted), refill(&answer))
            }
            Act::ShareHyp { pfn } => {
                let wanted = self.model.shown_to_el2(pfn);
                let answer = self.call(0, HostCall::ShareHyp, [pfn, 0, 0, 0]);
                if answer.is_ok() {
                    self.model.set(pfn, 1, |_| Own::ShownToHyp);
                }
                (answer, Some(wanted), plain(&answer))
            }
            Act::UnshareHyp { pfn } => {
                let shown = self.model.own(pfn) == Own::ShownToHyp;
                let wanted = if shown { Ok(()) } else { Err(Errno::EPERM) };
                let answer = self.call(0, HostCall::UnshareHyp, [pfn, 0, 0, 0]);
                if answer.is_ok() {
                    self.model.set(pfn, 1, |_| Own::Host);
                }
                (answer, Some(wanted), plain(&answer))
            }
            Act::FfaShare { pfn } => {
                let wanted = self.model.shown_to_el2(pfn);
                let answer = self.world.el2.ffa_share(pfn, 1);
                if let Ok(handle) = answer {
                    self.ffa.push((handle, pfn, 1));
                    self.model.set(pfn, 1, |_| Own::ShownToFfa);
                }
                (told(answer), Some(wanted), plain(&told(answer)))
            }
            Act::FfaDonate { pfn, nr } => {
                let mut wanted = self.model.given_away(pfn, nr);
                if !self.model.profile.is_android() {
                    wanted = Err(Errno::ENOSYS);
                }
                let answer = self.world.el2.ffa_donate(pfn, nr);
                if let Ok(handle) = answer {
                    self.ffa.push((handle, pfn, nr));
                    self.model.set(pfn, nr, |_| Own::Ffa);
                }
                (told(answer), Some(wanted), plain(&told(answer)))
            }
            Act::FfaReclaim { nth } => {
                let Some(at) = nth.checked_rem(self.ffa.len()) else {
                    let answer = self.world.el2.ffa_reclaim(99);
                    return (answer, Some(Err(Errno::EINVAL)), Kind::Refused);
                };
                let (handle, pfn, nr) = self.ffa.swap_remove(at);
                let answer = self.world.el2.ffa_reclaim(handle);
                self.model.set(pfn, nr, |_| Own::Host);
                (answer, Some(Ok(())), Kind::Done)
            }
            Act::MapDma { pfn } => self.dma(pfn, true),
            Act::UnmapDma { pfn } => self.dma(pfn, false),
            Act::Force { pfn } => {
                let wanted = self.model.forced(pfn);
                let answer = self.call(0, HostCall::ForceReclaimGuestPage, [pfn << 12, 0, 0, 0]);
                if answer.is_ok() {
                    self.model.destroy(pfn);
                }
                // A handle that nobody has, or somebody else.
                let is_lost = matches!(self.model.own(pfn), Own::Lost(State::NoPage, _));
                assert!(!is_lost || answer.is_err());
                (answer, (!is_lost).then_some(wanted), plain(&answer))
            }
            Act::Die { vm } => {
                let busy = self.loaded.iter().flatten().any(|&(loaded, _)| loaded == vm);
                let is_wrong = busy || self.model.vms[vm].dying;
                let wanted = if is_wrong { Err(Errno::EINVAL) } else { Ok(()) };
                let x = [self.guests[vm].handle, 0, 0, 0];
                let answer = self.call(0, HostCall::StartTeardownVm, x);
                self.model.vms[vm].dying |= answer.is_ok();
                (answer, Some(wanted), plain(&answer))
            }
            Act::Reclaim { vm, gfn } => {
                let wanted = self.model.reclaimed(vm, gfn);
                let x = [self.guests[vm].handle, gfn, 0, 0];
                let answer = self.call(0, HostCall::ReclaimDyingGuestPage, x);
                if answer.is_ok() {
                    self.model.lose(vm, gfn);
                }
                (answer, Some(wanted), plain(&answer))
            }
            Act::End { vm } => {
                let wanted = if self.model.vms[vm].dying { Ok(()) } else { Err(Errno::EINVAL) };
                (self.end(vm), Some(wanted), Kind::Many)
            }
            Act::TearDown { vm } => {
                self.tear_down(vm);
                (Ok(()), None, Kind::Many)
            }
            Act::Touch { who, cpu, pfn, stores } => self.touch(who, cpu, pfn, stores),
            Act::VcpuTouch { cpu, gfn, stores } => self.vcpu_touch(cpu, gfn, stores),
        }
    }

    fn donate_list(
        &mut self,
        cpu: usize,
        list: &[(u64, u64, u64)],
    ) -> (Wanted, Option<Wanted>, Kind) {
        let vm = self.vm_on(cpu);
        if let Some((vm, idx)) = self.loaded[cpu] {
            let said = self.world.el2.host_struct(self.guests[vm].vcpus[idx as usize]);
            let entry = |&(pfn, gfn, nr): &(u64, u64, u64)| ListedPages {
                pfn,
                gfn,
                order: if nr == BLOCK { 9 } else { 0 },
            };
            said.lock().listed = list.iter().map(entry).collect();
        }
        // As if one after the other had been given; undone if one could not be.
        let (frames, vms) = (self.model.frames.clone(), self.model.vms.clone());
        let mut wanted = if list.is_empty() { Err(Errno::EINVAL) } else { Ok(()) };
        for &(pfn, gfn, nr) in list {
            wanted = wanted.and_then(|()| self.model.donated(vm, pfn, gfn, nr));
            if let (Ok(()), Some(vm)) = (wanted, vm) {
                self.model.gain(vm, pfn, gfn, nr);
            }
        }
        if !self.model.profile.is_android() {
            wanted = Err(Errno::ENOSYS);
        }
        if wanted.is_err() {
            (self.model.frames, self.model.vms) = (frames, vms);
        }
        let answer = self.call(cpu, HostCall::DonateSglistGuest, [0; 4]);
        let kind = if answer.is_ok() { Kind::Listed } else { Kind::RefusedAfterRefill };
        (answer, Some(wanted), kind)
    }

    fn dma(&mut self, pfn: u64, maps: bool) -> (Wanted, Option<Wanted>, Kind) {
        let pages = Pages::new(Pfn::new(pfn), 1);
        let is_memory = !matches!(pfn, DEVICE | NO_MAP);
        let is_used = self.model.dma.contains_key(&pfn);
        let is_own = pfn != CARVEOUT && self.model.own(pfn) == Own::Host;
        let mut wanted = match (maps, is_memory) {
            (_, false) => Err(Errno::EPERM),
            (true, _) => is_own.then_some(()).ok_or(Errno::EPERM),
            (false, _) => is_used.then_some(()).ok_or(Errno::EINVAL),
        };
        if !self.model.profile.is_android() {
            wanted = Err(Errno::ENOSYS);
        }
        let answer = match maps {
            true => self.world.el2.map_dma(pages),
            false => self.world.el2.unmap_dma(pages),
        };
        if answer.is_ok() {
            let uses = self.model.dma.entry(pfn).or_default();
            *uses = if maps { *uses + 1 } else { uses.saturating_sub(1) };
            self.model.dma.retain(|_, uses| *uses > 0);
        }
        let kind = if answer.is_ok() { Kind::Done } else { Kind::Refused };
        (answer, Some(wanted), kind)
    }

    fn end(&mut self, vm: usize) -> Wanted {
        let Guest { handle, kvm, vcpus } = self.guests[vm];
        self.call(0, HostCall::FinalizeTeardownVm, [handle, 0, 0, 0])?;
        let el2 = &self.world.el2;
        let mut back = std::mem::take(&mut el2.host_struct(kvm).lock().returned);
        for at in [kvm, vcpus[0], vcpus[1]] {
            back.append(&mut el2.host_struct(at).lock().memcache);
            self.call(0, HostCall::UnshareHyp, [at >> 12, 0, 0, 0])?;
            back.push(at);
        }
        self.world.free.lock().extend(back.into_iter().map(|at| at >> 12));
        self.model.end(vm);
        self.guests[vm] = self.world.vm(self.model.vms[vm].protected);
        Ok(())
    }

    fn tear_down(&mut self, vm: usize) {
        for cpu in 0..PLAY_CPUS {
            if self.vm_on(cpu) == Some(vm) {
                self.world.put(cpu);
                self.loaded[cpu] = None;
            }
        }
        if !self.model.vms[vm].dying {
            self.call(0, HostCall::StartTeardownVm, [self.guests[vm].handle, 0, 0, 0]).unwrap();
        }
        let pieces: Vec<_> = self.model.vms[vm].pieces.iter().map(|(&at, p)| (at, p.nr)).collect();
        for (gfn, nr) in pieces {
            let (call, nr) = match self.model.vms[vm].protected {
                true => (HostCall::ReclaimDyingGuestPage, 0),
                false => (HostCall::UnshareGuest, nr),
            };
            self.call(0, call, [self.guests[vm].handle, gfn, nr, 0]).unwrap();
            self.model.lose(vm, gfn);
        }
        self.end(vm).unwrap();
    }

    /// Does it, and nothing is judged.
    pub(super) fn act(&mut self, act: &Act) -> (Wanted, Option<Wanted>, Kind) {
        self.feed_for(act);
        let (answer, wanted, kind) = self.perform(act);
        let name = format!("{act:?}");
        let name = name.split([' ', '{']).next().unwrap_or_default();
        *self.answers.entry(format!("{name} {answer:?}")).or_default() += 1;
        (answer, wanted, kind)
    }

    fn feed_for(&self, act: &Act) {
        if let Act::Donate { cpu, .. }
        | Act::DonateList { cpu, .. }
        | Act::Lend { cpu, .. }
        | Act::Split { cpu, .. } = *act
        {
            self.feed(cpu);
        }
    }

    /// Does it, with every rule before and after.
    ///
    /// # Errors
    /// What was wrong.
    pub(super) fn step(&mut self, act: &Act, flaw: Option<Flaw>) -> Result<(), String> {
        self.feed_for(act);
        let before = self.last.take().unwrap_or_else(|| Snapshot::of_heads(&self.world.el2));
        let remembered = flaw.map(|flaw| flaw.remember(&self.world.el2));
        let (answer, wanted, kind) = self.act(act);
        if let (Some(flaw), Some(remembered)) = (flaw, remembered) {
            flaw.spoil(&self.world.el2, &before, remembered, kind);
        }
        if let Some(wanted) = wanted.filter(|&wanted| wanted != answer) {
            return Err(format!("15: {answer:?}, and it should be {wanted:?}"));
        }
        let after = Snapshot::of_heads(&self.world.el2);
        let el2 = &self.world.el2;
        if let Some(wrong) = (Step { before: &before, after: &after, el2, kind }).wrong() {
            return Err(format!("{kind:?}: {wrong}"));
        }
        let mut hasty = el2.host.lock().tree.hasty_stores();
        for entry in el2.vms.lock().live() {
            hasty.extend(entry.vm.mmu.lock().tree.hasty_stores());
        }
        if !hasty.is_empty() {
            return Err(format!("20: {hasty:?}"));
        }
        self.last = Some(after);
        self.compare()
    }

    /// What the model says is what records and tables say.
    fn compare(&self) -> Result<(), String> {
        let host = self.world.el2.host.lock();
        for pfn in GUEST..GUEST + NR_GUEST {
            let page = host.page(Pfn::new(pfn));
            let (is, wanted) = ((page.host(), page.hyp(), page.nr_guests), self.model.record(pfn));
            if is != wanted {
                return Err(format!("{pfn:#x} is {is:?}, and should be {wanted:?}"));
            }
        }
        drop(host);
        for (vm, &guest) in self.model.vms.iter().zip(&self.guests) {
            for gfn in (0..8).chain(0x1fe..0x204).chain(0x3fe..0x402) {
                let (is, wanted) = (self.world.guest_state(guest, gfn), vm.state(gfn));
                if is != wanted {
                    return Err(format!("{gfn:#x} is {is:?}, and should be {wanted:?}"));
                }
            }
        }
        Ok(())
    }
}
