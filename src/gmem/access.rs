//! Checked accesses of the host: they never fault, and never see a conversion half way.
//!
//! An access goes through the pool's own alias of the memory, not through a view. It is transient:
//! it holds no pin, so it never makes a conversion fail; a conversion waits for it instead. It waits for
//! a folio that moves, and is refused by a conversion.

use super::object::{GuestMemfd, Inner};
use crate::addr::{ByteSize, Offset, Pa};
use crate::error::{Error, ErrorKind, Found, Op};
use crate::geometry::{PAGE_SIZE, index};
use crate::range::PgoffRange;
use crate::state::{Refusal, Stop, enter_section};

/// The most that is copied inside of one section, since a conversion waits for it.
const MOST_AT_ONCE: usize = 64 << 10;

impl GuestMemfd {
    /// Copies bytes of shared memory out. What has no folio reads as zeroes and gets none.
    ///
    /// All of the range is checked before anything is copied. A conversion to private that begins
    /// during a read of more than 64 KiB may end it half way, with the error below.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::NotShared`], [`ErrorKind::Busy`] (being converted)
    /// or [`ErrorKind::Quarantined`], with the first culprit; [`ErrorKind::MemoryFailure`] half way, with the
    /// page, if the memory is not there any more.
    #[inline]
    pub fn read(&self, at: Offset, buf: &mut [u8]) -> Result<(), Error> {
        let object = &*self.0;
        match object.in_page(at, buf.len(), |place| object.arena.read(place, buf)) {
            Some(()) => Ok(()),
            None => object.read_range(at, buf),
        }
    }

    /// Copies bytes into shared memory. What has no folio gets one.
    ///
    /// All of the range is checked before anything is copied. A conversion to private that begins
    /// during a write of more than 64 KiB may end it half way, with the error below.
    ///
    /// # Errors
    /// As [`read`](Self::read), and those of [`allocate`](Self::allocate).
    #[inline]
    pub fn write(&self, at: Offset, buf: &[u8]) -> Result<(), Error> {
        let object = &*self.0;
        match object.in_page(at, buf.len(), |place| object.arena.write(place, buf)) {
            Some(()) => Ok(()),
            None => object.write_range(at, buf),
        }
    }

    /// Loads eight bytes of shared memory at once, sequentially consistent.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`ErrorKind::Unaligned`] unless the offset is a multiple of 8.
    pub fn load_u64(&self, at: Offset) -> Result<u64, Error> {
        self.0.atomic(at, |object, place| object.arena.load_u64(place))
    }

    /// Stores eight bytes of shared memory at once, sequentially consistent.
    ///
    /// # Errors
    /// As [`load_u64`](Self::load_u64).
    pub fn store_u64(&self, at: Offset, value: u64) -> Result<(), Error> {
        self.0.atomic(at, |object, place| object.arena.store_u64(place, value))
    }
}

impl Inner {
    /// The pages that hold a byte range; `None` for no bytes at all.
    pub(super) fn pages_of(
        &self,
        op: Op,
        at: Offset,
        len: usize,
    ) -> Result<Option<PgoffRange>, Error> {
        let out_of_range = || Error::new(op, ErrorKind::OutOfRange);
        let end = at.checked_add(ByteSize::from_bytes(len as u64)).ok_or_else(out_of_range)?;
        if end.get() > self.pages.len_bytes().get() {
            return Err(out_of_range());
        }
        let Some(last) = (len as u64).checked_sub(1) else { return Ok(None) };
        let first = at.pgoff();
        let last = Offset::new(at.get() + last).pgoff();
        PgoffRange::new(first, last.get() - first.get() + 1).map(Some)
    }

    /// Runs an access inside of a section in which the pages are open.
    ///
    /// Whoever moves their folio or punches is waited for: he holds the layout for writing from before the
    /// freeze to after the thaw. What is found with the layout locked is a conversion, which is not.
    fn in_section<R>(
        &self,
        op: Op,
        pages: PgoffRange,
        mut access: impl FnMut() -> R,
    ) -> Result<R, Error> {
        let once = |access: &mut dyn FnMut() -> R| {
            let _section = enter_section();
            self.tree.check_open(pages).map(|()| access())
        };
        let outcome = match once(&mut access) {
            Err(Stop::At(_, Refusal::Converting)) => {
                // Outside of the section, which the holder of the lock may be waiting for.
                let _layout = self.layout.read();
                once(&mut access)
            }
            outcome => outcome,
        };
        outcome.map_err(|stop| self.stopped(op, Some(pages), stop))
    }

    /// Runs an access to bytes of one page, inside of a section, if the host may touch that and it has
    /// a frame. `None` otherwise; the long way says why.
    #[inline]
    fn in_page<R>(
        &self,
        at: Offset,
        len: usize,
        access: impl FnOnce(Pa) -> Result<R, Error>,
    ) -> Option<R> {
        if len == 0 || len > left_in_page(at) {
            return None;
        }
        let _section = enter_section();
        if !self.tree.is_open(at.pgoff()) {
            return None;
        }
        access(self.place(at)?).ok()
    }

    fn read_range(&self, at: Offset, buf: &mut [u8]) -> Result<(), Error> {
        let op = Op::Read;
        let Some(pages) = self.pages_of(op, at, buf.len())? else { return Ok(()) };
        self.in_section(op, pages, || ())?;
        let mut at = at;
        for chunk in buf.chunks_mut(MOST_AT_ONCE) {
            if let Some(pages) = self.pages_of(op, at, chunk.len())? {
                self.in_section(op, pages, || self.copy_out(at, chunk))??;
            }
            at = advance(op, at, chunk.len())?;
        }
        Ok(())
    }

    fn write_range(&self, at: Offset, buf: &[u8]) -> Result<(), Error> {
        let op = Op::Write;
        let Some(pages) = self.pages_of(op, at, buf.len())? else { return Ok(()) };
        // Before the first of several: what cannot be had as a whole is not written to.
        if buf.len() > MOST_AT_ONCE {
            self.in_section(op, pages, || ())?;
        }
        let mut at = at;
        for chunk in buf.chunks(MOST_AT_ONCE) {
            if let Some(pages) = self.pages_of(op, at, chunk.len())? {
                self.access_resident(op, pages, || self.copy_in(at, chunk))?;
            }
            at = advance(op, at, chunk.len())?;
        }
        Ok(())
    }

    /// Runs an access inside of a section in which the pages are shared and all have folios.
    fn access_resident<R>(
        &self,
        op: Op,
        pages: PgoffRange,
        mut access: impl FnMut() -> Result<R, Error>,
    ) -> Result<R, Error> {
        loop {
            let accessed =
                self.in_section(op, pages, || self.is_resident(pages).then(&mut access))?;
            if let Some(outcome) = accessed {
                return outcome;
            }
            // Whoever punches it away again before the next attempt has made progress.
            self.populate(op, &mut self.layout.write(), pages)?;
        }
    }

    fn atomic<R>(
        &self,
        at: Offset,
        access: impl Fn(&Self, Pa) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let op = Op::Atomic;
        if at.get() % 8 != 0 {
            return Err(Error::new(op, ErrorKind::Unaligned));
        }
        if let Some(result) = self.in_page(at, 8, |place| access(self, place)) {
            return Ok(result);
        }
        let Some(pages) = self.pages_of(op, at, 8)? else {
            return Err(Error::new(op, ErrorKind::OutOfRange));
        };
        self.access_resident(op, pages, || match self.place(at) {
            Some(place) => access(self, place).map_err(|e| failed_at(e, at)),
            None => Err(Error::new(op, ErrorKind::OutOfRange)),
        })
    }

    /// Where in the arena a byte is, if it has a frame.
    #[inline]
    fn place(&self, at: Offset) -> Option<Pa> {
        self.frames.frame(at.pgoff())?.pa().checked_add(at.in_page())
    }

    fn copy_out(&self, at: Offset, buf: &mut [u8]) -> Result<(), Error> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (part, behind) = rest.split_at_mut(left_in_page(at).min(rest.len()));
            match self.place(at) {
                Some(place) => self.arena.read(place, part).map_err(|e| failed_at(e, at))?,
                None => part.fill(0),
            }
            at = advance(Op::Read, at, part.len())?;
            rest = behind;
        }
        Ok(())
    }

    fn copy_in(&self, at: Offset, buf: &[u8]) -> Result<(), Error> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (part, behind) = rest.split_at(left_in_page(at).min(rest.len()));
            let place =
                self.place(at).ok_or_else(|| Error::new(Op::Write, ErrorKind::OutOfRange))?;
            self.arena.write(place, part).map_err(|e| failed_at(e, at))?;
            at = advance(Op::Write, at, part.len())?;
            rest = behind;
        }
        Ok(())
    }
}

/// Adds the page to the error of an access to memory that is gone.
#[cold]
pub(super) fn failed_at(error: Error, at: Offset) -> Error {
    match error.kind() {
        ErrorKind::MemoryFailure => error.at(at.pgoff().offset(), Found::Failed),
        _ => error,
    }
}

/// Bytes from here to the end of the page.
fn left_in_page(at: Offset) -> usize {
    index(PAGE_SIZE.get() - at.in_page().get())
}

fn advance(op: Op, at: Offset, len: usize) -> Result<Offset, Error> {
    at.checked_add(ByteSize::from_bytes(len as u64))
        .ok_or_else(|| Error::new(op, ErrorKind::OutOfRange))
}
