//! Where a view cannot do all of a run at once: a page of it is gone, or the kernel has no mapping left.

use super::shown::{Shown, between, block_of, first_page, next_run, part};
use super::view_map::{ViewMap, bytes};
use crate::addr::{ByteSize, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::HUGE_PAGES;
use crate::os::uffd::{Stopped, Userfault};
use crate::range::{PfnRange, PgoffRange};

impl ViewMap {
    /// Goes on where showing the pages has stopped. A page that the file has lost comes back, as zeroes, as it does where
    /// the kernel maps by itself; if it cannot, it stays hidden, and it alone. `shown` is told of all that can be touched.
    #[cold]
    pub(super) fn map_around(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        pages: PgoffRange,
        frames: PfnRange,
        stopped: Stopped,
    ) {
        let mut stopped = Some(stopped);
        let mut rest = Some(pages);
        while let (Some(run), Some(Stopped { at, error })) = (rest, stopped.take()) {
            let here = Pgoff::new(ByteSize::from_bytes(at as u64).whole_pages());
            if let Some(done) = between(run.start(), here) {
                shown.set(done, true);
            }
            let unit = PgoffRange::new(here, self.granule().nr_pages());
            let is_lost = [Errno::EFAULT, Errno::EIO, Errno::EHWPOISON].contains(&error.errno());
            let Some(unit) = unit.ok().filter(|_| is_lost) else {
                return self.keep_hidden(between(here, run.end()));
            };
            if self.bring_back(uffd, pages, frames, unit).is_ok() {
                shown.set(unit, true);
            } else {
                self.keep_hidden(Some(unit));
            }
            rest = between(unit.end(), run.end());
            if let Some(rest) = rest {
                stopped = self.map_run(uffd, rest).err();
                if stopped.is_none() {
                    shown.set(rest, true);
                }
            }
        }
    }

    fn bring_back(
        &self,
        uffd: &Userfault,
        pages: PgoffRange,
        frames: PfnRange,
        unit: PgoffRange,
    ) -> Result<(), Error> {
        let op = Op::MapView;
        let frames = part(pages, frames, unit);
        self.arena().refill(op, frames.ok_or_else(|| Error::new(op, ErrorKind::OutOfRange))?)?;
        self.map_run(uffd, unit).map_err(|stopped| stopped.error)
    }

    /// Whatever was mapped of them is taken out again, to agree with `shown`.
    fn keep_hidden(&self, pages: Option<PgoffRange>) {
        if let Some((at, len)) = pages.map(bytes) {
            let _ = self.map().discard(at, len);
        }
    }

    /// Closes the blocks when that has failed: together with all that are open beside them, which are whole mappings. That
    /// splits none, so it is possible where the process has as many as it may have.
    #[cold]
    pub(super) fn close_all_around(
        &self,
        uffd: &Userfault,
        shown: &mut Shown,
        blocks: PgoffRange,
        error: Error,
    ) -> Result<(), Error> {
        if error.kind() != ErrorKind::Exhausted {
            return Err(error);
        }
        let (mut first, mut end) = (block_of(blocks.start()), block_of(blocks.end()));
        while let Some(before) = first.get().checked_sub(1).map(Pgoff::new) {
            if !shown.is_open(before) {
                break;
            }
            first = before;
        }
        while shown.is_open(end) {
            end = Pgoff::new(end.get() + 1);
        }
        // What a walk before this one has closed already needs nothing.
        let Some(run) = next_run(&shown.open, first, end, true) else { return Ok(()) };
        for block in run.iter() {
            self.map_by_pages(PgoffRange::new(first_page(block), HUGE_PAGES)?)?;
        }
        let run = PgoffRange::new(first_page(run.start()), run.nr_pages() * HUGE_PAGES)?;
        self.close_whole(uffd, shown, run)
    }
}
