//! Where folios come by the VMM's wish: `fallocate`.

use super::object::GuestMemfd;
use crate::error::{Error, Op};
use crate::range::PgoffRange;

impl GuestMemfd {
    /// Gives every page of the range a folio, as `fallocate(FALLOC_FL_KEEP_SIZE)` does, and fills its holes.
    /// Cannot fail for want of frames, which were reserved when the object was created, unless it
    /// [overcommits](crate::Commitment::Overcommitted).
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::error::ErrorKind::OutOfRange);
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted) or
    /// [`ErrorKind::Os`](crate::error::ErrorKind::Os) if the host has no room for the mappings of a view, or
    /// no memory for a hole that it was given back. Nothing is allocated then.
    pub fn allocate(&self, range: PgoffRange) -> Result<(), Error> {
        self.0.check_range(Op::Allocate, range)?;
        self.0.populate(Op::Allocate, &mut self.0.layout.write(), range)
    }
}
