//! The same arithmetic on a list of frames, and a comparison of the two: for tests and fuzzers.

use arbitrary::{Arbitrary, Unstructured};

use super::{Frames, IsQuarantined, Promise, Taken, Wish};
use crate::folio::buddy::Buddy;
use crate::folio::ledger::Blocks;
use crate::folio::owner::Placement;
use crate::geometry::{FolioSize, GIANT_ORDER, HUGE_PAGES, index};

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    Free,
    /// Free, and to be scrubbed.
    Dirty,
    /// Being scrubbed.
    InHands,
    Taken,
    Quarantined,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Promise { huge: u8, base: u16 },
    Unpromise { huge: u8, base: u16 },
    Take { size: bool, home: Option<u16>, outside: Option<u16>, clean_first: bool, promised: bool },
    GiveBack { which: u8, dirty: bool, promised: bool },
    Scrub { end: End, fails_meanwhile: Option<u16> },
    Quarantine { which: u8 },
    Poison { pfn: u16 },
    Isolate { block: u8, fails_meanwhile: Option<u16> },
}

/// How a scrub ends.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    /// Whoever scrubbed is gone.
    Early,
    /// It cannot be done.
    Failed,
}

/// Does what some bytes say to frames and to a list; then the same with blocks of every order, those that
/// there are and those that there are not.
///
/// # Errors
/// The first difference.
pub(crate) fn compare_frames(bytes: &[u8]) -> Result<(), String> {
    let mut input = Unstructured::new(bytes);
    let sizes = [1, 511, 512, 1024 + 37, 3 * 512, 2048 + 5];
    let nr_pages = input.choose(&sizes).copied().unwrap_or(512);
    let mut both = Both::new(nr_pages).map_err(|error| error.to_string())?;
    for at in 0..200_u64 {
        let Ok(step) = Step::arbitrary(&mut input) else { break };
        both.step(step);
        both.compare(at % 16).map_err(|what| format!("{nr_pages} frames, {step:?}: {what}"))?;
    }
    compare_buddy(bytes)
}

struct Both {
    frames: Frames,
    list: Vec<Frame>,
    has_failed: Vec<bool>,
    /// A free block could not be scrubbed.
    has_lost: bool,
    taken: Vec<(u64, FolioSize)>,
    promised: Blocks,
    wrong: Option<String>,
}

impl Both {
    fn new(nr_pages: u64) -> Result<Self, crate::error::Error> {
        Ok(Self {
            frames: Frames::new(nr_pages)?,
            list: vec![Frame::Free; index(nr_pages)],
            has_failed: vec![false; index(nr_pages)],
            has_lost: false,
            taken: Vec::new(),
            promised: Blocks::default(),
            wrong: None,
        })
    }

    fn expect(&mut self, what: &str, holds: bool) {
        if !holds && self.wrong.is_none() {
            self.wrong = Some(what.to_owned());
        }
    }

    fn count(&self, wanted: impl Fn(Frame) -> bool) -> u64 {
        let frames = self.list.iter().zip(&self.has_failed);
        frames.filter(|&(&frame, &failed)| !failed && wanted(frame)).count() as u64
    }

    fn is_all(&self, start: u64, nr: u64, what: Frame) -> bool {
        let run = index(start)..index(start + nr);
        let frames = self.list.get(run.clone()).unwrap_or_default();
        let failed = self.has_failed.get(run).unwrap_or_default();
        frames.len() as u64 == nr
            && frames.iter().all(|&frame| frame == what)
            && !failed.contains(&true)
    }

    fn set(&mut self, start: u64, nr: u64, to: Frame) {
        let run = index(start)..index(start + nr);
        if let Some(frames) = self.list.get_mut(run) {
            frames.fill(to);
        }
    }

    /// Whole blocks and the rest: clean ones by counting, others by what they came as.
    fn free(&self) -> Blocks {
        let len = self.list.len() as u64;
        let starts = (0..len / HUGE_PAGES).map(|block| block * HUGE_PAGES);
        let whole = |&start: &u64| {
            let kinds = [Frame::Free, Frame::Dirty, Frame::InHands];
            kinds.into_iter().any(|kind| self.is_all(start, HUGE_PAGES, kind))
        };
        let huge = starts.filter(whole).count() as u64;
        // A block in hands is free as a whole, though a frame of it may have failed.
        let failed_in_hands = (0..len / HUGE_PAGES).filter(|&block| {
            let run = index(block * HUGE_PAGES)..index((block + 1) * HUGE_PAGES);
            let in_hands =
                self.list.get(run.clone()).is_some_and(|it| it.contains(&Frame::InHands));
            in_hands && self.has_failed.get(run).is_some_and(|it| it.contains(&true))
        });
        debug_assert_eq!(failed_in_hands.count(), 0);
        let free = |frame| matches!(frame, Frame::Free | Frame::Dirty | Frame::InHands);
        Blocks { giant: 0, huge, base: self.count(free) - huge * HUGE_PAGES }
    }

    fn fits(&self, promised: Blocks) -> bool {
        let free = self.free();
        let left = free.huge.checked_sub(promised.huge);
        left.is_some_and(|left| left * HUGE_PAGES + free.base >= promised.base)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Promise { huge, base } => {
                let more =
                    Blocks { giant: 0, huge: u64::from(huge % 4), base: u64::from(base % 700) };
                let promised = self.promised.plus(more);
                let wanted = self.fits(promised);
                let found = self.frames.promise(more);
                self.expect("a promise", found == wanted);
                self.promised = if found { promised } else { self.promised };
            }
            Step::Unpromise { huge, base } => {
                let fewer =
                    Blocks { giant: 0, huge: u64::from(huge % 4), base: u64::from(base % 700) };
                self.frames.unpromise(fewer);
                self.promised = self.promised.minus(fewer);
            }
            Step::Take { size, home, outside, clean_first, promised } => {
                let placement = match clean_first {
                    true => Placement::CleanFirst,
                    false => Placement::Contiguous,
                };
                self.take(size_of(size), (home, placement), outside, promised);
            }
            Step::GiveBack { which, dirty, promised } => self.give_back(which, dirty, promised),
            Step::Scrub { end, fails_meanwhile } => {
                let Some((start, size)) = self.frames.next_dirty() else {
                    let dirty = self.count(|frame| frame == Frame::Dirty);
                    return self.expect("nothing to scrub", dirty == 0);
                };
                self.expect("a dirty block", self.is_all(start, size.nr_pages(), Frame::Dirty));
                self.set(start, size.nr_pages(), Frame::InHands);
                self.fail_in(start, size.nr_pages(), fails_meanwhile);
                self.scrubbed(start, size, end);
            }
            Step::Quarantine { which } => {
                let Some(at) = usize::from(which).checked_rem(self.taken.len()) else { return };
                let (start, size) = self.taken.remove(at);
                self.frames.quarantine(start, size);
                self.set(start, size.nr_pages(), Frame::Quarantined);
            }
            Step::Poison { pfn } => self.poison(u64::from(pfn)),
            Step::Isolate { block, fails_meanwhile } => {
                let start = u64::from(block % 5) * HUGE_PAGES;
                if start + HUGE_PAGES > self.list.len() as u64 {
                    return;
                }
                let Some(runs) = self.frames.isolate(start, FolioSize::Huge2M) else { return };
                let free = runs.iter().all(|&(run, nr)| self.is_all(run, nr, Frame::Free));
                self.expect("isolated frames", free);
                let isolated: u64 = runs.iter().map(|&(_, nr)| nr).sum();
                let nr_free = self.frames.free().pages();
                self.expect(
                    "isolated frames are not free",
                    nr_free + isolated == self.free().pages(),
                );
                runs.iter().for_each(|&(run, nr)| self.set(run, nr, Frame::Taken));
                if let Some(&(run, nr)) = runs.first() {
                    self.fail_in(run, nr, fails_meanwhile);
                }
                for (run, nr) in runs {
                    self.frames.free_run(run, nr);
                    self.set(run, nr, Frame::Free);
                }
            }
        }
    }

    /// A frame of a run fails while somebody has that.
    fn fail_in(&mut self, start: u64, nr: u64, claim: Option<u16>) {
        if let Some(claim) = claim {
            self.poison(start + u64::from(claim) % nr);
        }
    }

    fn scrubbed(&mut self, start: u64, size: FolioSize, end: End) {
        let mut quarantined = Vec::new();
        match end {
            End::Done => {
                self.frames.scrubbed(start, size);
                return self.set(start, size.nr_pages(), Frame::Free);
            }
            End::Early => self.frames.not_scrubbed(start, size, |huge| quarantined.push(huge)),
            End::Failed => {
                self.frames.cannot_be_scrubbed(start, size, |huge| quarantined.push(huge));
            }
        }
        self.set(start, size.nr_pages(), Frame::Dirty);
        let has_failed = |huge: &u64| {
            let run = index(*huge)..index(huge + HUGE_PAGES);
            self.has_failed.get(run).is_some_and(|it| it.contains(&true))
        };
        let blocks = (start..start + size.nr_pages()).step_by(index(HUGE_PAGES));
        let is_lost = |huge: &u64| end == End::Failed || has_failed(huge);
        let wanted: Vec<u64> = blocks.filter(is_lost).collect();
        self.expect("lost blocks are quarantined", quarantined == wanted);
        self.has_lost |= !wanted.is_empty();
        wanted.iter().for_each(|&huge| self.set(huge, HUGE_PAGES, Frame::Quarantined));
    }

    fn take(
        &mut self,
        size: FolioSize,
        (home, placement): (Option<u16>, Placement),
        outside: Option<u16>,
        promised: bool,
    ) {
        let promise = if promised { Promise::Kept } else { Promise::None };
        let mut after = self.promised;
        let may = match after.of(size).checked_sub(1) {
            Some(left) if promised => {
                *after.of_mut(size) = left;
                true
            }
            _ => !promised,
        };
        let block = |at: u16| u64::from(at) >> size.order() << size.order();
        let (home, outside) = (home.map(block), outside.map(block));
        match self.frames.take(size, Wish { home, placement }, promise, |_| outside) {
            Taken::Clean(start) => self.took(start, size, Frame::Free, after),
            Taken::Dirty(start) => self.took(start, size, Frame::Dirty, after),
            Taken::ScrubFirst(start) => {
                let clean = self.count(|frame| frame == Frame::Free);
                let is_home = home.is_some_and(|it| it / HUGE_PAGES * HUGE_PAGES == start);
                let is_wished = is_home
                    && (placement == Placement::Contiguous || self.promised != Blocks::default());
                let may = size == FolioSize::Base && (clean == 0 || is_wished);
                self.expect("something clean was there", may);
                self.expect("a dirty block", self.is_all(start, HUGE_PAGES, Frame::Dirty));
                self.set(start, HUGE_PAGES, Frame::InHands);
                self.scrubbed(start, FolioSize::Huge2M, End::Done);
            }
            Taken::Wait => self.expect("nobody scrubs", false),
            Taken::Nothing => {
                let (free, nr) = (self.free(), size.nr_pages());
                let out_of_huge = Blocks { base: free.base + HUGE_PAGES - nr, ..free };
                let huge = free.huge.checked_sub(1).map(|huge| Blocks { huge, ..out_of_huge });
                let base = free.base.checked_sub(1).map(|base| Blocks { base, ..free });
                let base = base.filter(|_| size == FolioSize::Base);
                let keeps = |left: Blocks| {
                    let huge = left.huge.checked_sub(after.huge);
                    huge.is_some_and(|huge| huge * HUGE_PAGES + left.base >= after.base)
                };
                let had = may && [huge, base].into_iter().flatten().any(keeps);
                self.expect("there was a folio to be had", !had);
            }
        }
    }

    fn took(&mut self, start: u64, size: FolioSize, was: Frame, promised: Blocks) {
        self.expect("a folio of free frames", self.is_all(start, size.nr_pages(), was));
        self.expect("an aligned folio", start % size.nr_pages() == 0);
        self.set(start, size.nr_pages(), Frame::Taken);
        self.taken.push((start, size));
        self.promised = promised;
        // Unless failures had broken them before.
        let bad = self.has_lost || self.has_failed.contains(&true);
        self.expect("promises are kept", bad || self.fits(promised));
    }

    fn give_back(&mut self, which: u8, dirty: bool, promised: bool) {
        let Some(at) = usize::from(which).checked_rem(self.taken.len()) else { return };
        let (start, size) = self.taken.remove(at);
        let run = index(start)..index(start + size.nr_pages());
        let bad = self.has_failed.get(run).is_some_and(|it| it.contains(&true));
        let promise = if promised { Promise::Kept } else { Promise::None };
        let is_dirty = dirty && size == FolioSize::Huge2M && !bad;
        let again = if is_dirty {
            self.frames.give_back_dirty(start, size, promise);
            promise
        } else {
            self.frames.give_back_clean(start, size, promise)
        };
        self.expect("promised again", (again == Promise::Kept) == (promised && !bad));
        *self.promised.of_mut(size) += u64::from(promised && !bad);
        self.set(start, size.nr_pages(), if is_dirty { Frame::Dirty } else { Frame::Free });
    }

    fn poison(&mut self, pfn: u64) {
        let place = self.list.get(index(pfn)).copied();
        let quarantined = match place {
            Some(Frame::Quarantined) => IsQuarantined::Yes,
            _ => IsQuarantined::No,
        };
        let is_news = self.has_failed.get(index(pfn)) == Some(&false);
        let found = self.frames.poison(pfn, 1, quarantined);
        self.expect("a failure is news", found == Ok(is_news));
        if let Some(failed) = self.has_failed.get_mut(index(pfn)) {
            *failed = true;
        }
        if place == Some(Frame::Dirty) && is_news {
            let around = self.frames.dirty_around(pfn);
            let Some((start, size)) = around else { return self.expect("its dirty block", false) };
            self.set(start, size.nr_pages(), Frame::InHands);
            self.scrubbed(start, size, End::Done);
        }
    }

    /// Every sixteenth frame, another one each time, is looked at by itself.
    fn compare(&mut self, first: u64) -> Result<(), String> {
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        let free = self.free();
        if self.frames.free() != free || self.frames.promised() != self.promised {
            let (found, promised) = (self.frames.free(), self.frames.promised());
            return Err(format!("{found:?} {promised:?} should be {free:?} {:?}", self.promised));
        }
        let counts = [
            self.frames.nr_dirty(),
            self.frames.nr_quarantined(),
            self.frames.poisoned().len() as u64,
        ];
        let wanted = [
            self.count(|frame| frame == Frame::Dirty),
            self.count(|frame| frame == Frame::Quarantined),
            self.has_failed.iter().filter(|&&failed| failed).count() as u64,
        ];
        if counts != wanted {
            return Err(format!("dirty, quarantined, failed: {counts:?} should be {wanted:?}"));
        }
        let is_free = |frame| matches!(frame, Frame::Free | Frame::Dirty);
        let differs = (first..self.list.len() as u64).step_by(16).find(|&pfn| {
            let wanted = self.list.get(index(pfn)).is_some_and(|&frame| is_free(frame))
                && self.has_failed.get(index(pfn)) == Some(&false);
            self.frames.is_free(pfn) != wanted
        });
        differs.map_or(Ok(()), |pfn| Err(format!("frame {pfn} is free, or is not")))
    }
}

fn size_of(huge: bool) -> FolioSize {
    if huge { FolioSize::Huge2M } else { FolioSize::Base }
}

/// Blocks of any order, absurd ones among them, on three and a half blocks of 2 MiB.
fn compare_buddy(bytes: &[u8]) -> Result<(), String> {
    let nr_pages = 3 * HUGE_PAGES + 261;
    let mut buddy = Buddy::new(nr_pages).map_err(|error| error.to_string())?;
    buddy.free_run(0, nr_pages);
    let mut list = vec![true; index(nr_pages)];
    let mut taken: Vec<(u64, u8)> = Vec::new();
    for (at, pair) in bytes.chunks_exact(3).take(100).enumerate() {
        let &[what, order, place] = pair else { continue };
        let order = if order < 200 { order % 12 } else { order };
        let size = 1_u64.checked_shl(u32::from(order)).filter(|_| order <= GIANT_ORDER);
        let all_free = |list: &[bool], start: u64| {
            let run = size.and_then(|size| list.get(index(start)..index(start + size)));
            run.is_some_and(|run| !run.contains(&false))
        };
        let starts = |size: u64| (0..nr_pages).step_by(index(size));
        let found = match what % 3 {
            0 => buddy.allocate(order).inspect(|&pfn| taken.push((pfn, order))),
            1 => {
                let pfn = u64::from(place) << 3 >> order.min(60) << order.min(60);
                let wanted = all_free(&list, pfn);
                if buddy.allocate_at(pfn, order) != wanted {
                    return Err(format!("step {at}: block {pfn} of order {order}: {wanted}"));
                }
                wanted.then(|| taken.push((pfn, order))).map(|()| pfn)
            }
            _ => {
                let Some(which) = usize::from(place).checked_rem(taken.len()) else { continue };
                let (pfn, order) = taken.swap_remove(which);
                buddy.free(pfn, order);
                let run = index(pfn)..index(pfn + (1 << order));
                list.get_mut(run).unwrap_or_default().fill(true);
                continue;
            }
        };
        match (found, size) {
            (Some(pfn), Some(size)) if all_free(&list, pfn) && pfn % size == 0 => {
                let run = index(pfn)..index(pfn + size);
                list.get_mut(run).unwrap_or_default().fill(false);
            }
            (None, size) if what % 3 == 0 => {
                let is_there =
                    size.is_some_and(|size| starts(size).any(|pfn| all_free(&list, pfn)));
                if is_there {
                    return Err(format!("step {at}: there was a block of order {order}"));
                }
            }
            (None, _) => {}
            (Some(pfn), _) => {
                return Err(format!("step {at}: {pfn} of order {order} was not free"));
            }
        }
        let nr_free = list.iter().filter(|&&free| free).count() as u64;
        if buddy.blocks().pages() != nr_free {
            return Err(format!("step {at}: {:?} of {nr_free} free frames", buddy.blocks()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_do_what_a_list_does() {
        for seed in 1..if cfg!(miri) { 2_u64 } else { 40 } {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let bytes: Vec<u8> = (0..1200)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()[4]
                })
                .collect();
            compare_frames(&bytes).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        }
    }
}
