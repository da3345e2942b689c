//! Room in a slab for one more. A slab that grows by itself ends the process if the host has no memory.

use slab::Slab;

use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};

/// For so many at first.
const FEW: usize = 4;

/// Has a slab grow, if it is full, so that the next insertion does not.
///
/// A slab cannot be asked whether it could grow. So as much memory as it is about to want is taken in a way that may
/// fail, and given back. What another thread takes between that and the growth is missing there, and then the
/// process ends after all.
///
/// # Errors
/// [`ErrorKind::Exhausted`] without host memory for it.
#[inline]
pub(super) fn make_room<T>(slab: &mut Slab<T>, op: Op) -> Result<(), Error> {
    if fails(FailPoint::Record) {
        return Err(no_memory(op));
    }
    if slab.len() < slab.capacity() { Ok(()) } else { grow(slab, op) }
}

#[cold]
fn grow<T>(slab: &mut Slab<T>, op: Op) -> Result<(), Error> {
    let more = slab.capacity().max(FEW);
    // A slab's entry has a word for its list of free ones.
    let mut probe: Vec<(usize, T)> = Vec::new();
    let wanted = slab.capacity().saturating_add(more);
    probe.try_reserve_exact(wanted).map_err(|_| no_memory(op))?;
    drop(probe);
    slab.reserve_exact(more);
    Ok(())
}

fn no_memory(op: Op) -> Error {
    Error::new(op, ErrorKind::Exhausted).because("no host memory for a record")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_grows_before_it_is_full_or_says_that_it_cannot() {
        let mut slab = Slab::new();
        for nr in 0..100 {
            make_room(&mut slab, Op::Allocate).unwrap();
            let before = slab.capacity();
            slab.insert(nr);
            assert_eq!(slab.capacity(), before);
        }
        if cfg!(miri) {
            // There the host is what runs out of memory.
            return;
        }
        let mut absurd: Slab<[u8; 1 << 46]> = Slab::new();
        let error = make_room(&mut absurd, Op::Allocate).unwrap_err();
        assert_eq!((error.kind(), absurd.capacity()), (ErrorKind::Exhausted, 0));
    }
}
