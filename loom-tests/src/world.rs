//! What a model acts on: the words, the readers and the bytes of one small object.

use gmem::addr::Pgoff;
use gmem::modelled::{Domain, Frozen, Phase, Reader, Stop, Table, Visibility, Word};
use gmem::range::PgoffRange;
use loom::sync::Arc;

use crate::Memory;

/// An object of a few pages.
///
/// It is shared through std's `Arc`, not loom's: the pointer is no part of what is modelled, and
/// loom's would add steps and an order that the code under test does not give.
#[derive(Debug)]
pub struct World {
    /// The words.
    pub table: Table,
    /// The readers.
    pub domain: Arc<Domain>,
    /// The judge.
    pub memory: Memory,
}

impl World {
    /// What the host has left in the pages at the start.
    pub const HOST: u64 = 1;
    /// What the guest writes into pages that are private. The host never sees it.
    pub const SECRET: u64 = 2;
    /// What a conversion leaves in pages that it makes shared.
    pub const PREPARED: u64 = 3;

    /// So many pages, nobody in them.
    ///
    /// # Panics
    /// Never: a table of a few words is always to be had.
    pub fn new(nr_pages: u64, visibility: Visibility) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self {
            table: Table::new(nr_pages, visibility).expect("a few words"),
            domain: Arc::new(Domain::new()),
            memory: Memory::new(nr_pages, Self::HOST),
        })
    }

    /// A thread's place among the readers.
    pub fn reader(&self) -> Reader {
        Domain::register(&self.domain)
    }

    /// Steps 3, 4, 7 and 8 of a conversion, as the object takes them: freeze, wait for transient
    /// accesses, change the bytes, publish.
    ///
    /// # Errors
    /// Where the freeze stopped.
    pub fn convert(&self, range: PgoffRange, to: Visibility) -> Result<(), Stop> {
        let frozen = self.table.freeze_for(range, to)?;
        self.wait();
        self.publish(frozen, to);
        Ok(())
    }

    /// The same without the wait: for models that have no transient access. The lock and the fence
    /// inside the wait would order what there the words alone have to order.
    ///
    /// # Errors
    /// Where the freeze stopped.
    pub fn convert_without_readers(&self, range: PgoffRange, to: Visibility) -> Result<(), Stop> {
        let frozen = self.table.freeze_for(range, to)?;
        self.publish(frozen, to);
        Ok(())
    }

    /// Step 4 of a conversion.
    ///
    /// # Panics
    /// If the barrier is refused, which under loom it never is.
    pub fn wait(&self) {
        assert!(self.domain.wait());
    }

    fn publish(&self, frozen: Frozen<'_>, to: Visibility) {
        let left = match to {
            Visibility::Shared => Self::PREPARED,
            Visibility::Private => Self::SECRET,
        };
        frozen.runs().iter().for_each(|&run| self.memory.write_all(run, left));
        frozen.release(to);
    }

    /// A transient read of a range, as the object makes it: `None` if the host may not.
    pub fn read_in_section(&self, reader: &Reader, range: PgoffRange) -> Option<u64> {
        let _section = reader.enter();
        self.table.check_open(range).ok()?;
        Some(self.memory.read_all(range))
    }

    /// A transient write to a range: `None` if the host may not.
    pub fn write_in_section(&self, reader: &Reader, range: PgoffRange, value: u64) -> Option<()> {
        let _section = reader.enter();
        self.table.check_open(range).ok()?;
        self.memory.write_all(range, value);
        Some(())
    }

    /// Checks that nobody is in the range and that nobody left anything in its words but this
    /// visibility.
    ///
    /// # Panics
    /// If a word says otherwise.
    pub fn expect_idle(&self, range: PgoffRange, visibility: Visibility) {
        for page in range.iter() {
            assert_eq!(self.table.load(page), Some(Word::new(visibility)), "{page:?}");
        }
    }

    /// Checks that the range is quarantined.
    ///
    /// # Panics
    /// If a word says otherwise.
    pub fn expect_quarantined(&self, range: PgoffRange) {
        for page in range.iter() {
            let phase = self.table.load(page).map(Word::phase);
            assert_eq!(phase, Some(Phase::Quarantined), "{page:?}");
        }
    }
}

/// The page at this place.
pub fn page(at: u64) -> Pgoff {
    Pgoff::new(at)
}

/// The pages from `start` up to and without `end`.
///
/// # Panics
/// If there are none.
pub fn pages(places: std::ops::Range<u64>) -> PgoffRange {
    PgoffRange::new(page(places.start), places.end - places.start).expect("a few pages")
}
