//! A VM whose memory the host provides on demand: frames of its own are lent, shared, turned and taken back, while the
//! host's user space maps and pins some of them.

use super::super::host::{Contents, Side};
use super::judge::Zeroed;
use super::vms::{NR_PAGED, PAGED, Vms};
use super::{Step, vms};
use crate::addr::{Gfn, Pfn};
use crate::hyp::choices::Choices;
use crate::stage2::GuestRun;

impl Vms {
    pub(super) fn page(&mut self, choices: &mut Choices<'_>) -> Step {
        let first = choices.below(NR_PAGED);
        let nr_pages = 1 + choices.below(NR_PAGED - first);
        // Each frame has an address of its own, but for those that are asked for wrongly.
        let gfn = if choices.one_in(8) { choices.below(8) } else { first };
        let pfn = Pfn::new(PAGED + first);
        let runs = [GuestRun { gfn: Gfn::new(gfn), pfn, nr_pages }];
        let side = choices.of(&[Side::Lent, Side::Shared]);
        let mut zeroed = Zeroed::None;
        let (what, done) = match choices.below(5) {
            0 => {
                let is_pinned = choices.one_in(2);
                let add = choices.one_in(2);
                self.gunyah.with(|world| {
                    let seen = world.kernel.sees(pfn);
                    world.kernel.note_use(pfn, |uses| {
                        let nr = if is_pinned { &mut uses.nr_pinned } else { &mut uses.nr_mapped };
                        // The kernel gives user space only what it has itself.
                        *nr = if add && seen { 1 } else { 0 };
                    });
                });
                ("use", Ok(()))
            }
            1 | 2 => ("provide", self.paged.provide(&runs, side, true, &mut || ())),
            3 => ("turn", self.paged.turn(&runs, side, &mut || ())),
            _ => {
                let lent: Vec<_> = (0..nr_pages)
                    .filter_map(|nth| self.paged.given(Gfn::new(gfn + nth), 1).0)
                    .filter(|given| given.side == Side::Lent)
                    .map(|given| given.run.pfn)
                    .collect();
                let done = self.paged.reclaim(&runs, Contents::Clear);
                if done.is_ok() {
                    zeroed = Zeroed::Exactly(lent);
                }
                ("reclaim", done)
            }
        };
        let mut step = Step::named(format!("paged {what} {:?}", done.err()));
        step.refused = done.is_err();
        step.zeroed = zeroed;
        step.within = vms::paged().ok();
        step
    }
}
