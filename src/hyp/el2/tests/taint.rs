//! No byte that a protected guest or EL2 keeps to itself reaches anybody else but through a share, or a page that the
//! guest gives up as it is: whatever the way out, whoever looks.
//!
//! Each guest writes a mark of its own into every page that is its alone, EL2 into every page that it has. Who shows a
//! page or gives it up as it is, clears it first. After each act everybody reads all that they can.

use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};

use super::model::{BLOCK, Own};
use super::play::{Act, Play, Who};
use super::property::{PROFILES, opened, runner, wishes};
use super::*;
use crate::hyp::el2::guest_call::NO_POISON;

/// A guest's mark is this and its number.
const GUEST_INK: u8 = 0xd0;
const EL2_INK: u8 = 0xe0;
const MARK: usize = 16;

/// Clearing that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeftOut {
    OfTheDying,
    ByForce,
    GivenUp,
    /// What EL2 had for VMs, vCPUs and tables.
    OfEl2,
    /// All but the last page of a block is cleared.
    LastOfBlock,
    /// A new owner does not make EL2 forget what it copied: a page that was refused is shown all the same.
    OfTheRefused,
}

const LEFT_OUT: [LeftOut; 6] = [
    LeftOut::OfTheDying,
    LeftOut::ByForce,
    LeftOut::GivenUp,
    LeftOut::OfEl2,
    LeftOut::LastOfBlock,
    LeftOut::OfTheRefused,
];

/// A way to read a page, and whether it could be.
type Read<'a> = dyn Fn(&mut [u8]) -> bool + 'a;

struct Spies {
    play: Play,
}

/// What EL2 has comes back when a VM ends.
fn frames(act: &Act) -> impl Iterator<Item = u64> {
    let nr_kernel = match act {
        Act::End { .. } | Act::TearDown { .. } => NR_KERNEL,
        _ => 0,
    };
    (KERNEL..KERNEL + nr_kernel).chain(GUEST..GUEST + NR_GUEST)
}

impl Spies {
    fn new(profile: Profile) -> Self {
        let play = opened(World::with_bytes_everywhere(profile), profile);
        let spies = Self { play };
        spies.mark();
        spies
    }

    fn el2(&self) -> &El2 {
        &self.play.world.el2
    }

    /// Both ends of a page.
    fn write(&self, pfn: u64, mark: u8) {
        for at in [pfn << 12, (pfn << 12) + 4096 - MARK as u64] {
            self.el2().machine().write(Pa::new(at), &[mark; MARK]).unwrap();
        }
    }

    /// Guests and EL2 write into what is theirs alone.
    fn mark(&self) {
        let guests = self.play.model.frames.iter().filter_map(|(&pfn, own)| match *own {
            Own::Guest(vm, _) => Some((pfn, GUEST_INK + vm as u8)),
            _ => None,
        });
        guests.for_each(|(pfn, mark)| self.write(pfn, mark));
        for pfn in self.of_el2() {
            self.write(pfn, EL2_INK);
        }
    }

    fn of_el2(&self) -> Vec<u64> {
        let host = self.el2().host.lock();
        let owned = host.pages.touched().filter(|(_, page)| page.hyp() == State::Owned);
        owned.map(|(pfn, _)| pfn.get()).collect()
    }

    /// A guest clears what it is about to show, or to give up as it is.
    fn clear_first(&self, act: &Act) {
        let (cpu, gfn, nr) = match *act {
            Act::Show { cpu, gfn, nr } => (cpu, gfn, nr.max(1)),
            Act::GiveUp { cpu, gfn, flags: NO_POISON } => (cpu, gfn, 1),
            _ => return,
        };
        let Some((vm, _)) = self.play.loaded[cpu] else { return };
        for gfn in gfn..gfn + nr {
            if let Some((start, piece)) = self.play.model.vms[vm].piece(gfn) {
                if self.play.model.vms[vm].protected {
                    self.write(piece.pfn + gfn - start, 0);
                }
            }
        }
    }

    /// Who reads which page with what in it that is not its own.
    fn leak(&self, act: &Act) -> Option<String> {
        let mut page = [0; 4096];
        let found = |page: &[u8], own: Option<u8>| {
            let marks = page[..MARK].iter().chain(&page[4096 - MARK..]);
            let mut marks = marks.filter(|&&byte| byte >= GUEST_INK && Some(byte) != own);
            marks.next().copied()
        };
        for pfn in frames(act) {
            let at = Pa::new(pfn << 12);
            let ways: [(&str, &Read<'_>); 3] = [
                ("user space", &|page| self.el2().user(2, at, Bytes::Load(page)).is_ok()),
                ("the kernel's copies", &|page| {
                    self.el2().uaccess(2, at, Bytes::Load(page)).is_ok()
                }),
                // Without an IOMMU of EL2's, devices reach everything.
                ("a device", &|page| {
                    self.play.model.profile.is_android()
                        && self.el2().dma(at, Bytes::Load(page)).is_ok()
                }),
            ];
            for (who, read) in ways {
                if read(&mut page) {
                    if let Some(mark) = found(&page, None) {
                        return Some(format!("{who} found {mark:#x} at {pfn:#x}"));
                    }
                }
            }
        }
        for (cpu, loaded) in self.play.loaded.iter().enumerate() {
            let Some((vm, _)) = *loaded else { continue };
            for (&gfn, piece) in &self.play.model.vms[vm].pieces {
                for gfn in [gfn, gfn + piece.nr - 1] {
                    let read = self.el2().vcpu(cpu, Ipa::new(gfn << 12), Bytes::Load(&mut page));
                    if let (Ok(()), Some(mark)) = (read, found(&page, Some(GUEST_INK + vm as u8))) {
                        return Some(format!("guest {vm} found {mark:#x} at {gfn:#x}"));
                    }
                }
            }
        }
        None
    }

    /// Marks, and which pages the host has now that it had not.
    fn back(&self, before: &[(u64, bool)], left_out: LeftOut) {
        for &(pfn, was_el2s) in before {
            let is_back = self.play.world.host_state(pfn) == State::Owned;
            let is_spared = left_out == LeftOut::LastOfBlock && pfn % BLOCK != BLOCK - 1;
            if is_back && !is_spared && was_el2s == (left_out == LeftOut::OfEl2) {
                self.write(pfn, if was_el2s { EL2_INK } else { GUEST_INK });
            }
        }
    }

    fn step(&mut self, act: &Act, left_out: Option<LeftOut>) -> Result<(), String> {
        let guests = self.play.model.frames.iter();
        let guests = guests.filter(|(_, own)| matches!(own, Own::Guest(..)));
        let mut before: Vec<_> = guests.map(|(&pfn, _)| (pfn, false)).collect();
        before.extend(self.of_el2().into_iter().map(|pfn| (pfn, true)));
        self.clear_first(act);
        let refused = self.play.nr_done();
        let _judged_elsewhere = self.play.act(act);
        let was_done = self.play.nr_done() > refused;
        if let Some(left_out) = left_out {
            let applies = match left_out {
                LeftOut::OfTheDying | LeftOut::OfEl2 => {
                    matches!(act, Act::Reclaim { .. } | Act::TearDown { .. } | Act::End { .. })
                }
                LeftOut::ByForce => {
                    matches!(act, Act::Force { .. } | Act::Touch { who: Who::Kernel, .. })
                }
                LeftOut::GivenUp => matches!(act, Act::GiveUp { flags: 0, .. }),
                LeftOut::LastOfBlock => true,
                LeftOut::OfTheRefused => !was_done,
            };
            match (applies, left_out) {
                (true, LeftOut::OfTheRefused) => {
                    // As if the host's table had been changed before the refusal.
                    if let Some(&(pfn, _)) = before.iter().find(|&&(_, was_el2s)| !was_el2s) {
                        let mut host = self.el2().host.lock();
                        host.take_back(Pages::new(Pfn::new(pfn), 1), State::Owned).unwrap();
                    }
                }
                (true, _) => self.back(&before, left_out),
                _ => {}
            }
        }
        if let Some(leak) = self.leak(act) {
            return Err(format!("{act:x?}: {leak}"));
        }
        self.mark();
        Ok(())
    }
}

fn keeps_secrets(
    profile: Profile,
    mut runner: TestRunner,
    left_out: Option<LeftOut>,
) -> Result<(), TestError<Vec<super::property::Wish>>> {
    runner.run(&wishes(40), |wishes| {
        let mut spies = Spies::new(profile);
        for wish in wishes {
            let act = wish.act(&spies.play);
            spies.step(&act, left_out).map_err(TestCaseError::fail)?;
        }
        if left_out.is_none() {
            prop_assert_eq!(spies.el2().check(), Vec::<String>::new());
        }
        Ok(())
    })
}

#[test]
pub(super) fn secrets_stay() {
    for profile in PROFILES {
        let kept = keeps_secrets(profile, runner(8), None);
        kept.unwrap_or_else(|error| panic!("{profile:?}: {error}"));
    }
}

#[test]
pub(super) fn a_secret_that_leaves_is_seen() {
    is_seen(&LEFT_OUT[..3]);
}

#[test]
pub(super) fn a_secret_of_el2s_or_of_a_block_or_refusal_is_seen() {
    is_seen(&LEFT_OUT[3..]);
}

fn is_seen(left_out: &[LeftOut]) {
    for &left_out in left_out {
        let profile = match left_out {
            LeftOut::GivenUp => Profile::Android618,
            LeftOut::LastOfBlock => Profile::HugeProtected,
            _ => Profile::Mainline72,
        };
        match keeps_secrets(profile, runner(100), Some(left_out)) {
            Err(TestError::Fail(why, wishes)) => {
                println!("{left_out:?} in {}: {why}", wishes.len())
            }
            other => panic!("nobody notices {left_out:?}: {other:?}"),
        }
    }
}
