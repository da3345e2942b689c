//! Folio records: every folio that is in use, whose it is, and which of the owner's.

use slab::Slab;

use super::room::make_room;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_ORDER, HUGE_PAGES, index};

/// A folio in use. Frames are counted from the start of its arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) start: u64,
    pub(super) size: FolioSize,
    pub(super) state: Use,
}

/// What a folio that is not free is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It holds memory of an object: the owner, and the first page of it that is in the folio.
    Owned { owner: usize, page: u64 },
    /// Nobody knows what it holds.
    Quarantined,
}

/// What 2 MiB of an arena hold.
#[derive(Debug)]
enum Place {
    /// No folio begins here.
    Empty,
    /// One folio of 2 MiB or more begins here.
    Whole(u32),
    /// Folios of 4 KiB: keys plus one, zero where there is none, and how many there are.
    Cut(Box<[u32]>, u32),
}

/// The records of an arena, by frame.
#[derive(Debug)]
pub(super) struct Records {
    slab: Slab<Record>,
    places: Vec<Place>,
    nr_cut: u64,
}

impl Records {
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        let len = index(nr_pages.div_ceil(HUGE_PAGES));
        let mut places = Vec::new();
        places.try_reserve_exact(len).map_err(|_| exhausted(Op::CreatePool))?;
        places.resize_with(len, || Place::Empty);
        Ok(Self { slab: Slab::new(), places, nr_cut: 0 })
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let places = self.places.capacity() * size_of::<Place>();
        // A slab's entry has a word for its list of free ones.
        let records = self.slab.capacity() * (size_of::<Record>() + size_of::<usize>());
        (places + records) as u64 + self.nr_cut * HUGE_PAGES * size_of::<u32>() as u64
    }

    /// Writes a folio down.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] without host memory for it.
    pub(super) fn insert(&mut self, record: Record) -> Result<(), Error> {
        let (place, page) = split(record.start);
        make_room(&mut self.slab, Op::Allocate)?;
        let key = self.slab.vacant_key();
        let short = u32::try_from(key).ok().filter(|&key| key < u32::MAX);
        let (Some(short), Some(place)) = (short, self.places.get_mut(place)) else {
            return Err(exhausted(Op::Allocate));
        };
        if record.size == FolioSize::Base {
            if !matches!(place, Place::Cut(..)) {
                let mut keys = Vec::new();
                keys.try_reserve_exact(index(HUGE_PAGES)).map_err(|_| exhausted(Op::Allocate))?;
                keys.resize(index(HUGE_PAGES), 0);
                *place = Place::Cut(keys.into_boxed_slice(), 0);
                self.nr_cut += 1;
            }
            if let Place::Cut(keys, nr) = place {
                keys[page] = short + 1;
                *nr += 1;
            }
        } else {
            *place = Place::Whole(short);
        }
        self.slab.insert(record);
        Ok(())
    }

    /// Writes 2 MiB down as quarantined that were free.
    pub(super) fn lose(&mut self, start: u64) {
        let record = Record { start, size: FolioSize::Huge2M, state: Use::Quarantined };
        // Without memory to write it down it is out of use all the same.
        let _ = self.insert(record);
    }

    /// Forgets the folio that begins at a frame.
    pub(super) fn remove(&mut self, start: u64) -> Option<Record> {
        let key = self.key_at(start)?;
        let (place, page) = split(start);
        let place = self.places.get_mut(place)?;
        match place {
            Place::Cut(keys, nr) if *nr > 1 => {
                keys[page] = 0;
                *nr -= 1;
            }
            Place::Cut(..) => {
                self.nr_cut -= 1;
                *place = Place::Empty;
            }
            _ => *place = Place::Empty,
        }
        self.slab.try_remove(key)
    }

    /// The folio that begins at a frame.
    pub(super) fn at(&self, start: u64) -> Option<&Record> {
        self.slab.get(self.key_at(start)?)
    }

    pub(super) fn at_mut(&mut self, start: u64) -> Option<&mut Record> {
        let key = self.key_at(start)?;
        self.slab.get_mut(key)
    }

    /// The folio that a frame is in.
    pub(super) fn containing(&self, pfn: u64) -> Option<&Record> {
        let starts = [pfn, pfn & !(HUGE_PAGES - 1), pfn & !(FolioSize::Huge1G.nr_pages() - 1)];
        let mut found = starts.into_iter().filter_map(|start| self.at(start));
        found.find(|record| pfn - record.start < record.size.nr_pages())
    }

    /// The folios that begin in a run of frames, in ascending order.
    pub(super) fn within(&self, start: u64, nr_pages: u64) -> impl Iterator<Item = &Record> {
        let (mut next, end) = (start, start.saturating_add(nr_pages));
        std::iter::from_fn(move || {
            while next < end {
                let pfn = next;
                next = match self.places.get(split(pfn).0)? {
                    Place::Cut(..) => pfn + 1,
                    // At most one begins in these 2 MiB, at their start.
                    Place::Empty | Place::Whole(_) => (pfn | (HUGE_PAGES - 1)) + 1,
                };
                if let Some(record) = self.at(pfn) {
                    return Some(record);
                }
            }
            None
        })
    }

    fn key_at(&self, start: u64) -> Option<usize> {
        let (place, page) = split(start);
        let key = match self.places.get(place)? {
            Place::Whole(key) if page == 0 => *key,
            Place::Cut(keys, _) => keys.get(page)?.checked_sub(1)?,
            _ => return None,
        };
        usize::try_from(key).ok()
    }
}

fn split(pfn: u64) -> (usize, usize) {
    (index(pfn >> HUGE_ORDER), index(pfn % HUGE_PAGES))
}

fn exhausted(op: Op) -> Error {
    Error::new(op, ErrorKind::Exhausted).because("no host memory for a folio record")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(start: u64, size: FolioSize) -> Record {
        Record { start, size, state: Use::Owned { owner: 1, page: 0 } }
    }

    #[test]
    fn a_frame_finds_the_folio_that_it_is_in() {
        let mut records = Records::new((1 << 18) * 2 + 5).unwrap();
        let giant = record(1 << 18, FolioSize::Huge1G);
        let huge = record(512, FolioSize::Huge2M);
        let (one, two) = (record(1029, FolioSize::Base), record(1030, FolioSize::Base));
        for each in [giant, huge, one, two] {
            records.insert(each).unwrap();
            assert_eq!(records.at(each.start), Some(&each));
        }
        assert_eq!(records.containing((1 << 18) + 77_777), Some(&giant));
        assert_eq!(records.containing(1023), Some(&huge));
        assert_eq!(records.containing(1029), Some(&one));
        assert_eq!(records.containing(1031), None);
        assert_eq!(records.containing(0), None);
        assert_eq!(records.containing(u64::MAX), None);
        let here: Vec<_> = records.within(512, 600).copied().collect();
        assert_eq!(here, [huge, one, two]);
        let here = |start, nr_pages| records.within(start, nr_pages).copied().collect::<Vec<_>>();
        assert_eq!(here(0, u64::MAX), [huge, one, two, giant]);
        assert_eq!(here(513, 517), [one]);
        assert_eq!(here(1030, 1), [two]);
        assert_eq!(here(u64::MAX, 2), []);
        assert_eq!(records.remove(1029), Some(one));
        assert_eq!(records.remove(1029), None);
        assert_eq!(records.containing(1030), Some(&two));
        for each in [two, giant, huge] {
            assert_eq!(records.remove(each.start), Some(each));
        }
        assert_eq!((records.slab.len(), records.nr_cut), (0, 0));
    }
}
