//! Where a view cannot do all of a run at once: a page of it is gone.

use super::shown::{Shown, between, part};
use super::view_map::{ViewMap, bytes};
use crate::addr::{ByteSize, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Op};
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
}
