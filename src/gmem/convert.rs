//! Where a conversion is ordered. design/conversion.md argues the order.

use std::borrow::Cow;
use std::num::NonZeroU32;
use std::ops::Deref;
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use super::layout::{HidesIfPanicking, Layout};
use super::object::{GuestMemfd, Inner, PlacedPrivate, Sides};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::geometry::FolioSize;
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::{GuestRun, Stage2};
use crate::state::{
    Frozen, FrozenBlock, Phase, Reader, Refusal, Stop, Visibility, Wait, Wanted, with_reader,
};

/// What a conversion does with the bytes of the pages that change sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ContentPolicy {
    /// The other side finds what was written last.
    #[default]
    Preserve,
    /// Both sides find zeroes.
    Zero,
}

/// How a conversion is to be made: at once, with the bytes preserved, unless said otherwise.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    content: ContentPolicy,
    wait: Wait,
    most_culprits: NonZeroU32,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            content: ContentPolicy::default(),
            wait: Wait::never(),
            most_culprits: NonZeroU32::MIN,
        }
    }
}

impl ConvertOptions {
    /// What becomes of the bytes.
    #[must_use]
    pub fn content(mut self, content: ContentPolicy) -> Self {
        self.content = content;
        self
    }

    /// How long to wait for pins to be dropped and for other conversions to settle. Meanwhile no new
    /// pins are let in anywhere in the ranges; accesses go on until the last pin is gone.
    #[must_use]
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// How many subpages an error names that stood in the way; one unless said otherwise. More than one
    /// take a look at the whole range.
    #[must_use]
    pub fn most_culprits(mut self, most: NonZeroU32) -> Self {
        self.most_culprits = most;
        self
    }
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conversion {
    changed_pages: u64,
}

impl Conversion {
    /// How many pages changed sides; the others were where they should be already.
    pub fn changed_pages(&self) -> u64 {
        self.changed_pages
    }
}

impl GuestMemfd {
    /// Moves every page of the range to one side, in place: the bytes stay, the folio stays whole.
    /// All pages change, or none does.
    ///
    /// Only pages that are on the other side are looked at: the others may be pinned, and keep their
    /// bytes under [`ContentPolicy::Zero`] too. An access by [`read`](Self::read) and its kin either
    /// ends before the memory turns private, or is refused.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Busy`] if a page is pinned or being converted, with
    /// the first one and who holds it; [`ErrorKind::Quarantined`]; [`ErrorKind::HypervisorRefused`]
    /// or [`ErrorKind::SubscriberRefused`] with the errno of whoever refused;
    /// [`ErrorKind::Exhausted`] or [`ErrorKind::Os`] where a view or the host's memory is at its
    /// limits; [`ErrorKind::MissingCapability`] if the kernel refuses membarrier(2) that it granted
    /// before; [`ErrorKind::Unsupported`] if the sides of the object are [fixed](Sides::Fixed). All is as
    /// before then, but that pages which were to be shown in views may have got their
    /// folios, which read as zeroes.
    pub fn convert(
        &self,
        range: PgoffRange,
        to: Visibility,
        content: ContentPolicy,
    ) -> Result<Conversion, Error> {
        self.convert_ranges(&[range], to, &ConvertOptions::default().content(content))
    }

    /// [`convert`](Self::convert) for any number of ranges, in any order, as one conversion: all pages of
    /// all of them change, or none does; of no range at all, nothing. Cheaper than one call for each.
    ///
    /// With [time to wait](ConvertOptions::wait), a conversion to shared gives way to one to private
    /// that wants the same pages. Whoever waits must not hold a pin on the pages itself.
    ///
    /// # Errors
    /// As [`convert`](Self::convert); and with time to wait, instead of [`ErrorKind::Busy`],
    /// [`ErrorKind::TimedOut`] or [`ErrorKind::Cancelled`], with what stood in the way last.
    pub fn convert_ranges(
        &self,
        ranges: &[PgoffRange],
        to: Visibility,
        options: &ConvertOptions,
    ) -> Result<Conversion, Error> {
        let object = &*self.0;
        let op = match to {
            Visibility::Private => Op::ConvertToPrivate,
            Visibility::Shared => Op::ConvertToShared,
        };
        ranges.iter().try_for_each(|&range| object.check_range(op, range))?;
        if object.sides == Sides::Fixed {
            return Err(Error::new(op, ErrorKind::Unsupported)
                .because("the object was created with sides that stay as they are"));
        }
        let ranges = ascending(op, ranges)?;
        loop {
            if to == Visibility::Private {
                let placed = object.place_private(op, &ranges, &options.wait);
                placed.inspect_err(|_| object.fence_rest_of_failed())?;
            }
            match with_reader(|reader| object.convert(reader, op, &ranges, to, options)) {
                // Whoever has punched and touched it in between has made progress.
                Err(error) if to == Visibility::Private && object.is_displaced(&error) => {}
                outcome => return outcome.inspect_err(|_| object.fence_rest_of_failed()),
            }
        }
    }
}

/// The ranges as runs that neither overlap nor touch, in ascending order.
#[inline]
fn ascending(op: Op, ranges: &[PgoffRange]) -> Result<Cow<'_, [PgoffRange]>, Error> {
    let are_apart = |pair: &[PgoffRange]| matches!(pair, [one, next] if one.end() < next.start());
    match ranges.len() < 2 || ranges.windows(2).all(are_apart) {
        true => Ok(Cow::Borrowed(ranges)),
        false => Ok(Cow::Owned(sorted(op, ranges)?)),
    }
}

fn sorted(op: Op, ranges: &[PgoffRange]) -> Result<Vec<PgoffRange>, Error> {
    let mut sorted: Vec<PgoffRange> = Vec::new();
    if fails(FailPoint::Memory) || sorted.try_reserve_exact(ranges.len()).is_err() {
        return Err(Error::new(op, ErrorKind::Exhausted));
    }
    sorted.extend_from_slice(ranges);
    sorted.sort_unstable_by_key(PgoffRange::start);
    sorted.dedup_by(|next, last| match last.hull_if_joined(next) {
        Some(both) => {
            *last = both;
            true
        }
        None => false,
    });
    Ok(sorted)
}

impl Inner {
    fn convert(
        &self,
        reader: &Reader,
        op: Op,
        ranges: &[PgoffRange],
        to: Visibility,
        options: &ConvertOptions,
    ) -> Result<Conversion, Error> {
        if let [range] = *ranges {
            // Straight through, as most are.
            if let Some(block) = self.tree.freeze_block(reader, range, Wanted::Other(to)) {
                let outcome = self.convert_block(reader, op, block, to, options.content);
                return match outcome {
                    Ok(()) => Ok(Conversion { changed_pages: range.nr_pages() }),
                    Err(error) => Err(error.on(range)),
                };
            }
        }
        self.convert_parts(reader, op, ranges, to, options)
    }

    fn convert_parts(
        &self,
        reader: &Reader,
        op: Op,
        ranges: &[PgoffRange],
        to: Visibility,
        options: &ConvertOptions,
    ) -> Result<Conversion, Error> {
        let freeze = || self.tree.freeze(reader, ranges, Wanted::Other(to), &options.wait);
        let frozen = match freeze() {
            Err(Stop::At(_, Refusal::Converting)) if options.wait.is_never() => {
                // As in a checked access: who moves the folio is waited for, and shut out.
                let _layout = self.layout.read();
                freeze()
            }
            outcome => outcome,
        }
        .map_err(|stop| self.not_frozen(op, ranges, to, stop, options.most_culprits))?;
        if frozen.runs().is_empty() {
            frozen.thaw();
            return Ok(Conversion::default());
        }
        let changed_pages = frozen.runs().iter().map(PgoffRange::nr_pages).sum();
        let outcome = self.convert_frozen(reader, op, frozen, to, options.content);
        let over = |error: Error| match ranges {
            [range] => error.on(*range),
            _ => error,
        };
        outcome.map_err(over)?;
        Ok(Conversion { changed_pages })
    }

    /// The error for a freeze that did not come about, with as many culprits as are asked for.
    fn not_frozen(
        &self,
        op: Op,
        ranges: &[PgoffRange],
        to: Visibility,
        stop: Stop,
        most_culprits: NonZeroU32,
    ) -> Error {
        let first = stop.page();
        let range = ranges.iter().find(|range| first.is_some_and(|page| range.contains(page)));
        let mut error = self.stopped(op, range.copied(), stop);
        let Some(first) = first else { return error };
        let mut left = most_culprits.get() - 1;
        for (pages, word) in ranges.iter().flat_map(|&range| self.spans(range)) {
            if left == 0 {
                break;
            }
            if word.visibility() == to && word.phase() == Phase::Settled {
                continue;
            }
            // A fold is no obstacle: it is waited for.
            let Err(refusal) = word.unfold().unwrap_or(word).freeze() else { continue };
            for page in pages.iter().filter(|&page| page != first) {
                let Some(less) = left.checked_sub(1) else { break };
                left = less;
                error = error.at(page.offset(), self.found(page, refusal));
            }
        }
        error
    }

    /// Does with one frozen block what a conversion does. Whatever fails, it is thawed.
    #[inline]
    fn convert_block(
        &self,
        reader: &Reader,
        op: Op,
        block: FrozenBlock<'_>,
        to: Visibility,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        let pages = [block.pages()];
        let layout = match self.locked_for(op, &pages, to) {
            Ok(layout) => layout,
            Err(error) => {
                block.thaw();
                return Err(error);
            }
        };
        let is_plain = layout.has_views_alone()
            && content == ContentPolicy::Preserve
            && matches!(self.private, PlacedPrivate::Anywhere)
            && !block.could_merge();
        if !is_plain {
            return self.convert_locked(reader, op, &layout, block.into_frozen(), to, content);
        }
        // What is left of `take_from_host` and `make_shared` where there is nobody but views.
        let outcome = match to {
            Visibility::Private => self.take_from_views(reader, op, &layout, &pages),
            Visibility::Shared => {
                self.show(&layout, &pages, &pages);
                Ok(())
            }
        };
        match outcome {
            Ok(()) => {
                block.release(to);
                Ok(())
            }
            Err(error) => {
                block.thaw();
                Err(error)
            }
        }
    }

    /// Takes frozen pages away from those who are inside of an access, and from views. If it fails they are shown again.
    #[inline]
    fn take_from_views(
        &self,
        reader: &Reader,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<(), Error> {
        if fails(FailPoint::Barrier) || !reader.wait_for_others() {
            return Err(no_barrier(op));
        }
        self.hide(layout, pages).map_err(|error| {
            self.show(layout, pages, &[]);
            error.of(op)
        })
    }

    /// Does with the frozen pages what a conversion does. Whatever fails, they are thawed.
    fn convert_frozen(
        &self,
        reader: &Reader,
        op: Op,
        frozen: Frozen<'_>,
        to: Visibility,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        let layout = match self.locked_for(op, frozen.runs(), to) {
            Ok(layout) => layout,
            Err(error) => {
                frozen.thaw();
                return Err(error);
            }
        };
        self.convert_locked(reader, op, &layout, frozen, to, content)
    }

    /// The same with the layout locked.
    fn convert_locked(
        &self,
        reader: &Reader,
        op: Op,
        layout: &Layout,
        frozen: Frozen<'_>,
        to: Visibility,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        if let Err(error) = self.check_not_failed(op, layout, frozen.runs()) {
            frozen.thaw();
            return Err(error);
        }
        let _hidden = HidesIfPanicking { object: self, layout };
        match to {
            Visibility::Private => self.make_private(reader, op, layout, frozen, content),
            Visibility::Shared => self.make_shared(reader, op, layout, frozen, content),
        }
    }

    /// Locks the layout. If pages are to be shared and a view is there to show them, they have folios
    /// by then: this is the last moment at which finding one may fail.
    fn locked_for(
        &self,
        op: Op,
        pages: &[PgoffRange],
        to: Visibility,
    ) -> Result<Locked<'_>, Error> {
        loop {
            let layout = match self.arena.view_granule() {
                FolioSize::Base => Locked::ForReading(self.layout.read()),
                // Where views only know huge pages, a neighbour's visibility matters as well: one at a time.
                FolioSize::Huge2M | FolioSize::Huge1G => Locked::ForWriting(self.layout.write()),
            };
            if to == Visibility::Private || layout.views.is_empty() {
                return Ok(layout);
            }
            let Some(&run) = pages.iter().find(|&&run| !self.is_resident(run)) else {
                return Ok(layout);
            };
            drop(layout);
            // Frozen pages are not punched, so each round gets further.
            self.populate(op, &mut self.layout.write(), run)?;
        }
    }

    fn make_private(
        &self,
        reader: &Reader,
        op: Op,
        layout: &Layout,
        mut frozen: Frozen<'_>,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        match self.take_from_host(reader, op, layout, &mut frozen, content) {
            Ok(Settled::Yes) => {
                frozen.release(Visibility::Private);
                Ok(())
            }
            // The hypervisor has moved the pages, and nobody knows their bytes: dropped, and so
            // quarantined.
            Ok(Settled::No) => Err(Error::new(op, ErrorKind::Quarantined)),
            Err(error) => {
                frozen.thaw();
                Err(error)
            }
        }
    }

    /// Takes the frozen pages away from the host: first from those who are inside of an access, then
    /// from subscribers and views, then by the hypervisor. What is refused is undone, down to the
    /// freeze: while that lasts nobody can turn the pages private before they are shown again.
    fn take_from_host(
        &self,
        reader: &Reader,
        op: Op,
        layout: &Layout,
        frozen: &mut Frozen<'_>,
        content: ContentPolicy,
    ) -> Result<Settled, Error> {
        self.check_placed(op, frozen.runs())?;
        self.check_may_turn(op, layout, frozen.runs(), Visibility::Private)?;
        let guest = self.guest_runs(op, layout, frozen.runs())?;
        if fails(FailPoint::Barrier) || !frozen.wait_for_sections(reader) {
            return Err(no_barrier(op));
        }
        self.take_back(op, layout, frozen.runs())?;
        let hidden = self.hide(layout, frozen.runs());
        let outcome = hidden.and_then(|()| {
            self.move_pages(op, layout, &guest, frozen, content, |hypervisor, prepare| {
                hypervisor.make_private(&guest, prepare)
            })
        });
        match outcome {
            // Not yet published: afterwards another conversion could take them back, and this came too late.
            Ok(Settled::Yes) => self.grant_as(layout, Visibility::Private, frozen.runs()),
            Ok(Settled::No) => {}
            Err(_) => {
                self.show(layout, frozen.runs(), &[]);
                self.grant_again(layout, frozen.runs());
            }
        }
        outcome.map_err(|error| error.of(op))
    }

    fn make_shared(
        &self,
        reader: &Reader,
        op: Op,
        layout: &Layout,
        mut frozen: Frozen<'_>,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        let checked = self.check_may_turn(op, layout, frozen.runs(), Visibility::Shared);
        let outcome = checked.and_then(|()| {
            let guest = self.guest_runs(op, layout, frozen.runs())?;
            self.take_back(op, layout, frozen.runs())?;
            let moved =
                self.move_pages(op, layout, &guest, &frozen, content, |hypervisor, prepare| {
                    hypervisor.make_shared(&guest, prepare)
                });
            if moved.is_err() {
                self.grant_again(layout, frozen.runs());
            }
            moved
        });
        match outcome {
            Ok(Settled::Yes) => {
                // Before the words are published: afterwards another conversion could hide the pages,
                // and they would be shown after that.
                self.show(layout, frozen.runs(), frozen.runs());
                self.grant_as(layout, Visibility::Shared, frozen.runs());
                // Without the barrier blocks stay split, and that is all.
                if frozen.could_merge() {
                    let _ = frozen.wait_for_sections(reader);
                }
                frozen.release(Visibility::Shared);
                Ok(())
            }
            // As in `make_private`.
            Ok(Settled::No) => Err(Error::new(op, ErrorKind::Quarantined)),
            Err(error) => {
                frozen.thaw();
                Err(error)
            }
        }
    }

    /// Has the hypervisor move the pages, if there is one and it has to do with them, and the bytes
    /// settled in the moment when it has: not before, for it may refuse, and not after, for a vCPU
    /// could have written to them. Those that no guest sees follow.
    fn move_pages(
        &self,
        op: Op,
        layout: &Layout,
        guest: &[GuestRun],
        frozen: &Frozen<'_>,
        content: ContentPolicy,
        ask: impl FnOnce(&dyn Stage2, &mut dyn FnMut(GuestRun)) -> Result<(), Errno>,
    ) -> Result<Settled, Error> {
        let refused = |errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno);
        let Some(hypervisor) = layout.hypervisor().filter(|_| !guest.is_empty()) else {
            return Ok(self.settle(content, frozen.runs().iter().copied()));
        };
        if fails(FailPoint::Hypervisor) {
            return Err(refused(Errno::ENOMEM));
        }
        let (mut nr_prepared, mut done) = (0, Ok(()));
        let mut prepare = |run: GuestRun| {
            nr_prepared += run.nr_pages;
            if content == ContentPolicy::Zero && done.is_ok() {
                let frames = PfnRange::new(run.pfn, run.nr_pages);
                done = frames.and_then(|frames| self.arena.zero(frames));
            }
        };
        ask(&*hypervisor, &mut prepare).map_err(refused)?;
        if done.is_err() {
            return Ok(Settled::No);
        }
        if nr_prepared != guest.iter().map(|run| run.nr_pages).sum::<u64>() {
            // It has left some out, and did not say which.
            return Ok(self.settle(content, frozen.runs().iter().copied()));
        }
        let unbound = frozen.runs().iter().flat_map(|&run| layout.unbound(run));
        Ok(self.settle(content, unbound))
    }

    fn settle(
        &self,
        content: ContentPolicy,
        mut pages: impl Iterator<Item = PgoffRange>,
    ) -> Settled {
        let done = match content {
            ContentPolicy::Preserve => Ok(()),
            ContentPolicy::Zero => pages.try_for_each(|run| self.zero_resident(run)),
        };
        if done.is_ok() { Settled::Yes } else { Settled::No }
    }
}

#[cold]
fn no_barrier(op: Op) -> Error {
    Error::new(op, ErrorKind::MissingCapability)
        .because("membarrier(2) is refused since it was registered")
}

/// The layout, locked as a conversion needs it.
enum Locked<'a> {
    ForReading(RwLockReadGuard<'a, Layout>),
    ForWriting(RwLockWriteGuard<'a, Layout>),
}

impl Deref for Locked<'_> {
    type Target = Layout;

    fn deref(&self) -> &Layout {
        match self {
            Self::ForReading(layout) => layout,
            Self::ForWriting(layout) => layout,
        }
    }
}

/// Whether the bytes are as the caller of a conversion wants them. They are, but for an arena that has
/// lost its memory.
enum Settled {
    Yes,
    No,
}

#[cfg(test)]
mod tests;
