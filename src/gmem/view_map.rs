//! One mapping of an object: which pages of it can be touched, and how they are made so.
//!
//! A view is a range of addresses that begins as a mapping of the object's empty file, where every
//! touch is a `SIGBUS`. With userfaultfd, folios of the arena are mapped over it and registered, so
//! that a page without a page-table entry is a `SIGBUS` too. To share a page is to give it an entry,
//! to make it private is to take that away: no mapping is split, no byte moves. Without userfaultfd,
//! pages are mapped over it when they turn shared, and the empty file when they turn private.
//!
//! A block of 2 MiB all of which is shared needs nobody's protection. It may be *open*: not registered,
//! so that the kernel maps what is touched by itself, and by a huge entry where it can. Before a page
//! of it is hidden it is closed.
//!
//! What this covers: loads, stores and system calls of this process through this view. What it does
//! not: a child after fork (it gets no mapping at all), other mappings of the arena, and pins that
//! the kernel took through the view earlier (io_uring, O_DIRECT, VFIO).

use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::object::Inner;
use super::shown::{Shown, between, block_of, first_page, next_run, part, whole_blocks};
use super::view_options::{ViewMapping, ViewPath};
use crate::addr::{ByteSize, Hva, Pfn, Pgoff};
use crate::backing::{Arena, ArenaBacking, Part};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES, PAGE_BYTES, index};
use crate::os::mapping::Mapping;
use crate::os::maps::{FileId, Maps};
use crate::os::smaps::Smaps;
use crate::os::uffd::{Source, Stopped, Userfault};
use crate::range::{PfnRange, PgoffRange};

pub(super) struct ViewMap {
    // Before `way`, since fields are dropped in this order: without userfaultfd every page that the
    // mapping still covers could be touched.
    map: Mapping,
    way: Way,
    mapping: ViewMapping,
    arena: Arc<Arena>,
    granule: FolioSize,
    /// Held across the system calls that change it, so that the two never differ.
    shown: Mutex<Shown>,
}

enum Way {
    Userfault(Userfault),
    Fixed,
}

impl ViewMap {
    pub(super) fn new(object: &Inner, path: ViewPath, mapping: ViewMapping) -> Result<Self, Error> {
        let op = Op::MapView;
        if !object.arena.has_files() {
            return Err(Error::new(op, ErrorKind::Unsupported)
                .because("a pool on the heap has no file that could be mapped"));
        }
        let way = match path {
            ViewPath::Best | ViewPath::UserfaultfdSyscall => {
                Way::Userfault(Userfault::open(Source::Syscall)?)
            }
            ViewPath::UserfaultfdDevice => Way::Userfault(Userfault::open(Source::Device)?),
            ViewPath::Fixed => Way::Fixed,
        };
        let size = object.pages.len_bytes();
        let granule = object.arena.view_granule();
        let align = granule.max(FolioSize::Huge2M).bytes();
        let map = Mapping::of_nothing(op, object.identity.as_fd(), size, align)?;
        let shown = Shown::nothing(op, object.pages.nr_pages())?;
        let arena = Arc::clone(&object.arena);
        Ok(Self { map, way, mapping, arena, granule, shown: Mutex::new(shown) })
    }

    pub(super) fn map(&self) -> &Mapping {
        &self.map
    }

    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }

    pub(super) fn granule(&self) -> FolioSize {
        self.granule
    }

    /// Puts a folio behind pages of which nothing is shown. What was there before and this one may hold
    /// what nobody may see, or be somebody else's soon: not even for a moment does either show, and no store
    /// of a raw pointer gets lost in one of them. For that moment the fault is a `SIGSEGV`. Without
    /// userfaultfd neither is there: what is hidden is the empty file. If it fails, the folio is as out of
    /// reach as before.
    pub(super) fn install(&self, object: &Inner, pages: PgoffRange, pfn: Pfn) -> Result<(), Error> {
        let Way::Userfault(uffd) = &self.way else { return Ok(()) };
        let (at, len) = bytes(pages);
        let frames = PfnRange::new(pfn, pages.nr_pages())?;
        let (fd, file_at) = self
            .arena
            .file_of(frames)
            .ok_or_else(|| Error::new(Op::MapView, ErrorKind::Unsupported))?;
        let exhausted = |_| Error::new(Op::MapView, ErrorKind::Exhausted);
        // Should it have to be undone, and that fail.
        self.shown().astray.try_reserve(1).map_err(exhausted)?;
        self.map.map_inaccessible(at, len, fd, file_at)?;
        self.shown().is_right(pages);
        let outcome = self.register(uffd, at, len).and_then(|()| self.map.make_accessible(at, len));
        if outcome.is_err() {
            // Inaccessible is as good as hidden, should this fail too.
            let _ = self.cover(object, pages);
        }
        outcome
    }

    /// A folio that was [installed](Self::install) could not be replaced by the one before: the pages stay hidden until something else is put
    /// there.
    pub(super) fn goes_astray(&self, pages: PgoffRange) {
        let shown = &mut *self.shown();
        shown.is_right(pages);
        // An install that had no room here has changed nothing.
        if shown.astray.try_reserve(1).is_ok() {
            shown.astray.push(pages);
        }
    }

    /// Makes what is mapped at the pages answer with SIGBUS.
    fn register(&self, uffd: &Userfault, at: usize, len: usize) -> Result<(), Error> {
        self.map.keep_private(at, len)?;
        self.map.forbid_collapse(at, len)?;
        uffd.register(&self.map, at, len)?;
        // Whatever was touched before it was registered is mapped, and stays so if left alone: a block that was
        // open, or what a debugger has looked at.
        self.map.discard(at, len)
    }

    /// Takes the folio behind the pages away, nothing of which is shown.
    pub(super) fn remove(&self, object: &Inner, pages: PgoffRange) -> Result<(), Error> {
        let Way::Userfault(_) = &self.way else { return Ok(()) };
        self.cover(object, pages)?;
        self.shown().is_right(pages);
        Ok(())
    }

    /// Makes the pages of all the ranges accessible, as far as they have frames. Should the kernel have no
    /// memory or no room for that, they go on faulting, which is safe, and `shown` says so.
    #[inline]
    pub(super) fn show(&self, object: &Inner, ranges: &[PgoffRange]) {
        let shown = &mut *self.shown();
        let nr_done = match &self.way {
            Way::Userfault(uffd) if shown.astray.is_empty() => {
                self.show_each(object, uffd, shown, ranges)
            }
            Way::Userfault(_) | Way::Fixed => 0,
        };
        for &range in ranges.get(nr_done..).unwrap_or_default() {
            object.frames.each_resident(range, |pages, frames| match shown.astray.is_empty() {
                true => self.show_all(object, shown, pages, frames),
                false => self.show_around(object, shown, pages, frames),
            });
        }
    }

    /// Shows ranges that are one entry each and open nothing, with as little as can be between two system calls; says
    /// how many, from the first on. The next one is something else, or failed.
    #[inline]
    fn show_each(
        &self,
        object: &Inner,
        uffd: &Userfault,
        shown: &mut Shown,
        ranges: &[PgoffRange],
    ) -> usize {
        let is_one = |range: &&PgoffRange| {
            let is_granule = self.is_granule(**range) && !shown.has(range.start());
            is_granule && object.frames.in_one_folio(**range).is_some()
        };
        let nr_simple = ranges.iter().take_while(is_one).count();
        let simple = ranges.get(..nr_simple).unwrap_or_default();
        let nr_done = uffd.map_each(&self.map, simple.iter().map(|&range| bytes(range)));
        shown.set_each(simple.get(..nr_done).unwrap_or_default(), true);
        nr_done
    }

    /// The same of what is not astray.
    #[cold]
    fn show_around(&self, object: &Inner, shown: &mut Shown, pages: PgoffRange, frames: PfnRange) {
        let mut rest = Some(pages);
        while let Some(run) = rest {
            let first = shown.astray.iter().filter_map(|astray| astray.intersection(&run));
            let first = first.min_by_key(|astray| astray.start());
            let end = first.map_or(run.end(), |astray| astray.start());
            let right = between(run.start(), end);
            if let Some((run, frames)) =
                right.and_then(|run| Some((run, part(pages, frames, run)?)))
            {
                self.show_all(object, shown, run, frames);
            }
            rest = first.and_then(|astray| between(astray.end(), run.end()));
        }
    }

    fn show_all(&self, object: &Inner, shown: &mut Shown, pages: PgoffRange, frames: PfnRange) {
        let mut from = pages.start();
        while let Some(run) = next_run(&shown.pages, from, pages.end(), false) {
            from = run.end();
            let Some(frames) = part(pages, frames, run) else { return };
            let done = match &self.way {
                Way::Fixed => self.show_fixed(object, run, frames),
                Way::Userfault(uffd) => self.show_registered(uffd, shown, run, frames),
            };
            if done {
                shown.set(run, true);
            }
        }
    }

    /// Whether these are the pages that an entry of the view maps at once.
    #[inline]
    fn is_granule(&self, pages: PgoffRange) -> bool {
        let nr_pages = self.granule.nr_pages();
        pages.nr_pages() == nr_pages && pages.start().get() & (nr_pages - 1) == 0
    }

    /// Shows pages by mapping them; says whether they can be touched then.
    fn show_fixed(&self, object: &Inner, run: PgoffRange, frames: PfnRange) -> bool {
        match self.map_file(run, frames) {
            Ok(()) => true,
            Err(NotMapped::Undone(_)) => false,
            Err(NotMapped::Left(_)) => self.cover(object, run).is_err(),
        }
    }

    /// Maps the empty file over the pages.
    fn cover(&self, object: &Inner, pages: PgoffRange) -> Result<(), Error> {
        let (at, len) = bytes(pages);
        // From where the pages are in the object, so that neighbours become one mapping.
        self.map.map_over(at, len, object.identity.as_fd(), pages.start_offset().get())
    }

    /// Shows pages none of which is shown. What is to be opened is. Either all can be touched then, or `shown` has been told
    /// of those that can.
    fn show_registered(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        run: PgoffRange,
        frames: PfnRange,
    ) -> bool {
        let Some(blocks) = self.opens(run, frames) else {
            return self.map_pages(uffd, shown, run, frames);
        };
        let opened = part(run, frames, blocks)
            .is_some_and(|frames| self.open(uffd, shown, blocks, frames).is_ok());
        if !opened {
            return self.map_pages(uffd, shown, run, frames);
        }
        shown.set(blocks, true);
        let around = [between(run.start(), blocks.start()), between(blocks.end(), run.end())];
        for rest in around.into_iter().flatten() {
            if part(run, frames, rest).is_some_and(|part| self.map_pages(uffd, shown, rest, part)) {
                shown.set(rest, true);
            }
        }
        false
    }

    /// The blocks of the run that are to be opened, now that they turn shared as a whole.
    fn opens(&self, run: PgoffRange, frames: PfnRange) -> Option<PgoffRange> {
        let blocks = whole_blocks(run)?;
        let is_wanted = match (self.granule, self.mapping) {
            (FolioSize::Base, ViewMapping::Lazy) => true,
            // One entry for 512, and cheaper than theirs.
            (FolioSize::Base, ViewMapping::Eager) => {
                self.arena.part_of(frames.start())?.backing() == ArenaBacking::MemfdThp
            }
            (FolioSize::Huge2M | FolioSize::Huge1G, _) => false,
        };
        is_wanted.then_some(blocks)
    }

    /// Opens whole blocks that are shared: nobody has a page of them to hide.
    fn open(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        blocks: PgoffRange,
        frames: PfnRange,
    ) -> Result<(), Error> {
        match self.map_file(blocks, frames) {
            Ok(()) => shown.set_open(blocks, true),
            Err(NotMapped::Undone(error)) => return Err(error),
            Err(NotMapped::Left(error)) => {
                let (at, len) = bytes(blocks);
                if self.register(uffd, at, len).is_ok() {
                    return Err(error);
                }
                // It cannot be closed at the moment; it is shared.
                shown.set_open(blocks, true);
            }
        }
        Ok(())
    }

    /// Maps the frames over the pages, for everybody to touch.
    fn map_file(&self, pages: PgoffRange, frames: PfnRange) -> Result<(), NotMapped> {
        let (at, len) = bytes(pages);
        let file = self.arena.file_of(frames);
        let (fd, file_at) =
            file.ok_or_else(|| NotMapped::Undone(Error::new(Op::MapView, ErrorKind::Unsupported)))?;
        self.map.map_over(at, len, fd, file_at).map_err(NotMapped::Undone)?;
        self.map.keep_private(at, len).map_err(NotMapped::Left)?;
        let is_small = self
            .arena
            .part_of(frames.start())
            .is_some_and(|part| part.backing() == ArenaBacking::Memfd);
        // A huge entry costs less than the fault that would bring it.
        if self.mapping == ViewMapping::Eager || !is_small {
            // What is not populated is faulted in when it is touched. Before collapsing is forbidden:
            // the kernel takes it for a ban on huge entries as well.
            let _ = self.map.populate_shared(at, len);
        }
        self.map.forbid_collapse(at, len).map_err(NotMapped::Left)
    }

    /// Gives the pages entries. Either all have theirs then, or `shown` has been told of those that have.
    fn map_pages(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        pages: PgoffRange,
        frames: PfnRange,
    ) -> bool {
        match self.map_run(uffd, pages) {
            Ok(()) => true,
            Err(stopped) => {
                self.map_around(uffd, shown, pages, frames, stopped);
                false
            }
        }
    }

    pub(super) fn map_run(&self, uffd: &Userfault, pages: PgoffRange) -> Result<(), Stopped> {
        let (at, len) = bytes(pages);
        uffd.map_pages(&self.map, at, len, index(self.granule.bytes().get()))
    }

    /// Makes the pages of all the ranges fault. If it fails, some of them may.
    #[inline]
    pub(super) fn hide(&self, object: &Inner, ranges: &[PgoffRange]) -> Result<(), Error> {
        let shown = &mut *self.shown();
        match &self.way {
            Way::Fixed => self.hide_fixed(object, shown, ranges),
            Way::Userfault(uffd) => {
                if shown.has_opened {
                    ranges.iter().try_for_each(|&range| self.close_for(uffd, shown, range))?;
                }
                // If it fails half way, what still has entries is found to have them when it is shown again.
                shown.set_each(ranges, false);
                self.map.discard_each(ranges.iter().map(|&range| bytes(range)))
            }
        }
    }

    fn hide_fixed(
        &self,
        object: &Inner,
        shown: &mut Shown,
        ranges: &[PgoffRange],
    ) -> Result<(), Error> {
        if shown.spare.is_none() {
            let page = FolioSize::Base.bytes();
            let one = || Mapping::of_nothing(Op::MapView, object.identity.as_fd(), page, page);
            shown.spare = Some([one()?, one()?]);
        }
        for &range in ranges {
            self.cover(object, range).inspect_err(|_| drop(shown.spare.take()))?;
            shown.set(range, false);
        }
        Ok(())
    }

    /// Closes what is open of the blocks that the range is in.
    fn close_for(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        range: PgoffRange,
    ) -> Result<(), Error> {
        if let Some(blocks) = whole_blocks(range) {
            let (mut from, end) = (block_of(blocks.start()), block_of(blocks.end()));
            while let Some(open) = next_run(&shown.open, from, end, true) {
                from = open.end();
                let pages =
                    PgoffRange::new(first_page(open.start()), open.nr_pages() * HUGE_PAGES)?;
                self.close_whole(uffd, shown, pages)
                    .or_else(|error| self.close_all_around(uffd, shown, pages, error))?;
            }
        }
        // What can still be open is at the two ends, and not in the range as a whole.
        let last = Pgoff::new(range.end().get() - 1);
        for block in [block_of(range.start()), block_of(last)] {
            if shown.is_open(block) {
                let pages = PgoffRange::new(first_page(block), HUGE_PAGES)?;
                self.close_part(uffd, shown, pages)
                    .or_else(|error| self.close_all_around(uffd, shown, pages, error))?;
            }
        }
        Ok(())
    }

    /// Closes blocks that are about to be hidden as a whole.
    pub(super) fn close_whole(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        blocks: PgoffRange,
    ) -> Result<(), Error> {
        let (at, len) = bytes(blocks);
        uffd.register(&self.map, at, len)?;
        shown.set_open(blocks, false);
        Ok(())
    }

    /// Closes a block of which some pages stay shown. Those never fault with a signal meanwhile: entries for
    /// single pages are there before it is registered, and a huge one would go as a whole with the first page
    /// that is taken out of it.
    fn close_part(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        block: PgoffRange,
    ) -> Result<(), Error> {
        self.map_by_pages(block)?;
        self.close_whole(uffd, shown, block)
    }

    /// Gives each page of an open block an entry of its own.
    pub(super) fn map_by_pages(&self, block: PgoffRange) -> Result<(), Error> {
        let (at, len) = bytes(block);
        self.map.discard(at, len)?;
        match self.map.populate_shared(at, len) {
            // Memory that failed has no entry any more, and ends the call. It is what is to be hidden, or was
            // touched in vain already.
            Err(error) if error.errno() == Errno::EHWPOISON => self.populate_sound(at, len),
            outcome => outcome,
        }
    }

    fn populate_sound(&self, at: usize, len: usize) -> Result<(), Error> {
        (at..at + len).step_by(PAGE_BYTES).try_for_each(|at| {
            match self.map.populate_shared(at, PAGE_BYTES) {
                Err(error) if error.errno() == Errno::EHWPOISON => Ok(()),
                outcome => outcome,
            }
        })
    }

    /// Maps blocks of 2 MiB by huge entries where all of them is shown and the memory is huge; says how many
    /// pages are in blocks for which that was done.
    pub(super) fn regain(
        &self,
        object: &Inner,
        pages: PgoffRange,
        frames: PfnRange,
    ) -> Result<u64, Error> {
        let is_thp = |part: &Part| part.backing() == ArenaBacking::MemfdThp;
        let Some(blocks) = whole_blocks(pages) else { return Ok(0) };
        if !self.arena.part_of(frames.start()).is_some_and(is_thp) {
            return Ok(0);
        }
        let shown = &mut *self.shown();
        let mut nr_pages = 0;
        for block in blocks.start().get() / HUGE_PAGES..blocks.end().get() / HUGE_PAGES {
            let block = PgoffRange::new(first_page(Pgoff::new(block)), HUGE_PAGES)?;
            let is_open =
                next_run(&shown.open, block_of(block.start()), block_of(block.end()), true);
            let hidden = next_run(&shown.pages, block.start(), block.end(), false);
            if is_open.is_some() || hidden.is_some() {
                continue;
            }
            let Some(frames) = part(pages, frames, block) else { continue };
            self.regain_block(object, shown, block, frames)?;
            nr_pages += HUGE_PAGES;
        }
        Ok(nr_pages)
    }

    fn regain_block(
        &self,
        object: &Inner,
        shown: &mut Shown,
        block: PgoffRange,
        frames: PfnRange,
    ) -> Result<(), Error> {
        match &self.way {
            Way::Fixed => match self.map_file(block, frames) {
                Ok(()) => Ok(()),
                Err(NotMapped::Undone(error)) => Err(error),
                Err(NotMapped::Left(error)) => {
                    shown.set(block, self.cover(object, block).is_err());
                    Err(error)
                }
            },
            Way::Userfault(uffd) => self.open(uffd, shown, block, frames).inspect_err(|_| {
                shown.set(block, false);
                if self.map_pages(uffd, shown, block, frames) {
                    shown.set(block, true);
                }
            }),
        }
    }

    /// The first page of the range that cannot be touched.
    pub(super) fn first_hidden(&self, range: PgoffRange) -> Option<Pgoff> {
        let hidden = next_run(&self.shown().pages, range.start(), range.end(), false);
        hidden.map(|run| run.start())
    }

    /// How much is mapped by huge entries of transparent huge pages, by the kernel's account.
    pub(super) fn huge(&self) -> ByteSize {
        let start = self.map.hva().get() as u64;
        Smaps::read().shared_huge(&(start..start + self.map.len() as u64))
    }

    /// Which pages the kernel's page tables really have, for the audit.
    pub(super) fn present(&self, nr_pages: usize) -> std::io::Result<Vec<bool>> {
        crate::os::pagemap::present(self.map.hva(), nr_pages)
    }

    /// Which of the pages is the first that maps anything else than its frame, for the audit.
    pub(super) fn misplaced(
        &self,
        maps: &Maps,
        pages: PgoffRange,
        frames: PfnRange,
    ) -> std::io::Result<Option<Pgoff>> {
        let file = self.arena.file_of(frames);
        let (fd, file_at) = file.ok_or(std::io::ErrorKind::Unsupported)?;
        let (at, len) = bytes(pages);
        let start = Hva::new(self.map.hva().get() + at);
        let right = maps.matching(start, len as u64, FileId::of(fd)?, file_at);
        let first = pages.start().get() + ByteSize::from_bytes(right).whole_pages();
        Ok((right < len as u64).then_some(Pgoff::new(first)))
    }

    /// Whether the kernel maps this page by itself when it is touched, if it is shown.
    pub(super) fn is_faulted_in(&self, shown: &Shown, page: Pgoff) -> bool {
        matches!(self.way, Way::Fixed) || shown.is_open(block_of(page))
    }

    pub(super) fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why frames could not be mapped for everybody to touch, and what of that is left.
enum NotMapped {
    /// Nothing.
    Undone(Error),
    /// A mapping that may show them to raw pointers.
    Left(Error),
}

impl fmt::Debug for ViewMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ViewMap({}+{:#x})", self.map.hva(), self.map.len())
    }
}

/// Where the pages are in a mapping of the whole object. The object fits in an address space, or
/// there would be no view.
#[inline]
pub(super) fn bytes(pages: PgoffRange) -> (usize, usize) {
    (index(pages.start_offset().get()), index(pages.len_bytes().get()))
}
