//! Whether a pool is one object's own, so that its file can be given away.
//!
//! Whoever has the file of a pool reaches all of its memory, and keeps it for as long as he likes. So a file goes
//! out only if nobody else's memory is in it, and once it was out nobody else's ever will be.

use crate::error::{Error, ErrorKind, Op};
use crate::sync::Mutex;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// For one object, which there is not yet, or not any more.
    Vacant,
    /// It has its object.
    Occupied,
    /// It had its object out of the house: no other will follow.
    Spent,
}

/// Whom a pool is for. `None`: for any number of objects, and nothing goes out.
#[derive(Debug)]
pub(super) struct Dedication(Option<Mutex<Turn>>);

impl Dedication {
    pub(super) fn to_everybody() -> Self {
        Self(None)
    }

    pub(super) fn to_one() -> Self {
        Self(Some(Mutex::new(Turn::Vacant)))
    }

    /// An object comes.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the pool is another's.
    pub(super) fn occupy(&self) -> Result<(), Error> {
        let Some(turn) = &self.0 else { return Ok(()) };
        let mut turn = turn.lock();
        let exists = |why| Err(Error::new(Op::CreateObject, ErrorKind::Exists).because(why));
        match *turn {
            Turn::Vacant => {
                *turn = Turn::Occupied;
                Ok(())
            }
            Turn::Occupied => exists("the pool is dedicated to another object"),
            Turn::Spent => {
                exists("the pool's memory was exported, and may still be mapped elsewhere")
            }
        }
    }

    /// The object is gone.
    pub(super) fn vacate(&self) {
        let Some(turn) = &self.0 else { return };
        let mut turn = turn.lock();
        if *turn == Turn::Occupied {
            *turn = Turn::Vacant;
        }
    }

    /// The file goes out.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless the pool is dedicated.
    pub(super) fn spend(&self) -> Result<(), Error> {
        let Some(turn) = &self.0 else {
            return Err(Error::new(Op::Export, ErrorKind::Unsupported)
                .because("other objects may be in the pool's files: it is not dedicated"));
        };
        *turn.lock() = Turn::Spent;
        Ok(())
    }

    /// Whether [`spend`](Self::spend) would be refused.
    pub(super) fn is_to_everybody(&self) -> bool {
        self.0.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_after_the_other_until_it_was_out() {
        let pool = Dedication::to_one();
        pool.occupy().unwrap();
        assert_eq!(pool.occupy().unwrap_err().kind(), ErrorKind::Exists);
        pool.vacate();
        pool.occupy().unwrap();
        pool.spend().unwrap();
        pool.spend().unwrap();
        pool.vacate();
        assert_eq!(pool.occupy().unwrap_err().kind(), ErrorKind::Exists);
    }

    #[test]
    fn what_is_for_everybody_stays_in() {
        let pool = Dedication::to_everybody();
        pool.occupy().unwrap();
        pool.occupy().unwrap();
        assert_eq!(pool.spend().unwrap_err().kind(), ErrorKind::Unsupported);
        pool.vacate();
        pool.occupy().unwrap();
    }
}
