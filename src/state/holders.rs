//! Who holds which pins: written down on the way to every pin, read only when somebody asks.
//!
//! Each thread has records of its own, in blocks that are never given back to the allocator. Only
//! the thread that has a block looks for a free record in it, so finding one is a matter of plain
//! loads; whoever drops the pin, on whatever thread, frees the record by a plain store. No path of a
//! pin or its release runs an atomic read-modify-write or takes a lock, but for the one pin that
//! finds too few records free.
//!
//! A query reads the records of all threads while they change. A record is written like a seqlock:
//!
//! | who | does |
//! |---|---|
//! | note | sees the head free; writes the fields, each with Release; makes the head live |
//! | clear | makes the head free, with Release |
//! | query | reads the head, the fields, passes an Acquire fence, and reads the head again |
//!
//! A query that saw the head live sees the fields that belong to it, or later ones. If it saw a
//! later field, that store handed it, through the fence, what the thread had seen when it wrote the
//! field: that the head was free. So the second look finds a head other than the first, and the
//! query passes the record over. It need not try again: a pin that is held all the time has a
//! record that does not change.
//!
//! A pin is noted before it is counted in its words, and cleared after. So whoever has seen it
//! counted finds it, unless it has been uncounted since; then a look at the words that follows says
//! so. And when nothing moves the records are exact.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

use crate::addr::Pgoff;
pub use crate::identity::ObjectId;
use crate::range::PgoffRange;
use crate::sync::{Arc, AtomicU64, MODELLED, Mutex, fence};

/// How many records a thread starts with. A model has to meet a block that is full.
const FIRST_BLOCK: usize = if MODELLED { 1 } else { 64 };

/// Who holds a pin: a number that the object has given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerId(pub u32);

/// The first word of a record: the owner in the upper half; in the lower a count, odd while the
/// record is live, that grows with every note and every clear.
///
/// It comes back to the same value after 2^31 lives. A query would have to stand still between its
/// two looks while exactly so many pins go through this one record: a thread uses its records in
/// turn, so that is minutes of pins and nothing else.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Head(u64);

impl Head {
    const LIVE: u64 = 1;
    const OWNER_SHIFT: u32 = 32;
    const COUNT: u64 = (1 << Self::OWNER_SHIFT) - 1;

    fn is_live(self) -> bool {
        self.0 & Self::LIVE != 0
    }

    /// From free to live. The owner of the life before goes.
    fn noted(self, owner: OwnerId) -> Self {
        Self(u64::from(owner.0) << Self::OWNER_SHIFT | self.0 & Self::COUNT | Self::LIVE)
    }

    /// From live to free. The count may run over into the owner, who means nothing any more.
    fn cleared(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    fn owner(self) -> Option<OwnerId> {
        u32::try_from(self.0 >> Self::OWNER_SHIFT).ok().map(OwnerId)
    }
}

/// A pin, written down; or room for one.
///
/// Two share a cache line, and none lies in two.
#[derive(Debug)]
#[repr(align(32))]
pub struct Record {
    head: AtomicU64,
    object: AtomicU64,
    /// Twice the first page, and one if it is the only one: then there is no need for the next field.
    pages: AtomicU64,
    nr_pages: AtomicU64,
}

const _: () = assert!(MODELLED || size_of::<Record>() == 32);

impl Record {
    fn new() -> Self {
        let [head, object, pages, nr_pages] = [0; 4].map(AtomicU64::new);
        Self { head, object, pages, nr_pages }
    }

    /// The head, if the record is free. Asked only by the thread that has the block.
    #[inline]
    fn free(&self) -> Option<Head> {
        // Acquire: pairs with the Release in `clear`. A query that finds the next pin here, and so
        // not the last one, sees that uncounted. That it does not mix the two needs less: it cannot
        // see an older head than we did, if it sees what we write next.
        let head = Head(self.head.load(Ordering::Acquire));
        (!head.is_live()).then_some(head)
    }

    /// Makes a free record live.
    #[inline]
    fn write(&self, free: Head, object: ObjectId, range: PgoffRange, owner: OwnerId) {
        // Release, each of the three: pairs with the fence in `read`, the first with the Acquire
        // there, too. Who sees a field knows of the clear before it. A fence in front of them would
        // do the same, and cost more where it costs anything.
        self.object.store(object.as_u64(), Ordering::Release);
        let is_single = range.nr_pages() == 1;
        self.pages.store(range.start().get() << 1 | u64::from(is_single), Ordering::Release);
        if !is_single {
            self.nr_pages.store(range.nr_pages(), Ordering::Release);
        }
        // Release: pairs with the first Acquire in `read`. Who sees the head sees its fields.
        self.head.store(free.noted(owner).0, Ordering::Release);
    }

    /// The pages of the pin, for whoever has noted it and not cleared it yet.
    #[inline]
    pub fn range(&self) -> Option<PgoffRange> {
        // Relaxed: ours, and the guard, which says where the record is, has brought it along.
        self.range_of(self.pages.load(Ordering::Relaxed))
    }

    /// The first of them.
    #[inline]
    pub fn start(&self) -> Pgoff {
        // Relaxed: as in `range`.
        Pgoff::new(self.pages.load(Ordering::Relaxed) >> 1)
    }

    #[inline]
    fn range_of(&self, pages: u64) -> Option<PgoffRange> {
        let nr_pages = match pages & 1 {
            // Relaxed: the callers see to it that it belongs to the other field.
            0 => self.nr_pages.load(Ordering::Relaxed),
            _ => 1,
        };
        PgoffRange::new(Pgoff::new(pages >> 1), nr_pages).ok()
    }

    /// Under which number it was noted, for the same.
    #[inline]
    pub fn owner(&self) -> OwnerId {
        // Relaxed: as in `range`.
        Head(self.head.load(Ordering::Relaxed)).owner().unwrap_or(OwnerId(0))
    }

    /// Ends what the record says. By any thread, once for each note, after the pin is not counted
    /// any more.
    #[inline]
    pub fn clear(&self) {
        // Relaxed: the head is this life's until we write it, and the guard, which says where the
        // record is, has brought it along.
        let head = Head(self.head.load(Ordering::Relaxed));
        debug_assert!(head.is_live(), "a record is cleared twice");
        // Release: pairs with the Acquire in `free`, and with both looks at the head in `read`. Who
        // sees the record free, or finds another pin in it, sees this one uncounted.
        self.head.store(head.cleared().0, Ordering::Release);
    }

    /// What the record says, if that is a pin of the object and does not change meanwhile.
    fn read(&self, object: ObjectId) -> Option<(PgoffRange, OwnerId)> {
        // Acquire: pairs with the last Release in `write`, and with the one in `clear`.
        let head = Head(self.head.load(Ordering::Acquire));
        // Acquire: pairs with the first Release in `write`. We may leave without the fence, and then
        // must have seen what ended the life that `head` is of.
        if !head.is_live() || self.object.load(Ordering::Acquire) != object.as_u64() {
            return None;
        }
        // Relaxed: the fence and the second look tell whether this is of the same life, and the next
        // field, too.
        let range = self.range_of(self.pages.load(Ordering::Relaxed));
        // Acquire: pairs with the Release of each field in `write`. The second look is no older than
        // any of them.
        fence(Ordering::Acquire);
        // Acquire: pairs with the Release in `clear`, and with the last one in `write`.
        if self.head.load(Ordering::Acquire) != head.0 {
            return None;
        }
        Some((range?, head.owner()?))
    }
}

/// Records that one thread at a time looks for a free one in.
type Block = &'static [Record];

/// The records of all threads.
#[derive(Debug)]
pub struct Holders(Mutex<Registry>);

#[derive(Debug)]
struct Registry {
    /// Every block there ever was.
    blocks: Vec<Block>,
    /// Those whose thread has ended. Room for all is reserved: an exit must not fail.
    idle: Vec<Block>,
}

impl Holders {
    /// No records at all.
    pub fn new() -> Self {
        Self(Mutex::new(Registry { blocks: Vec::new(), idle: Vec::new() }))
    }

    /// A thread's own records; memory is taken at the first note. Not a method: loom's `Arc` cannot
    /// be a receiver.
    pub fn register(holders: &Arc<Self>) -> Records {
        Records {
            block: Cell::new(&[]),
            next: Cell::new(0),
            nr_skipped: Cell::new(0),
            round: RefCell::new(Round { blocks: Vec::new(), nr_entered: 0, nr_visited: 0 }),
            holders: Arc::clone(holders),
        }
    }

    /// Calls `seen` with the pages and the owner of every record of the object.
    ///
    /// A pin that was counted before the call and is held until its end is among them; one that
    /// comes or goes meanwhile may be, and one that has gone is seen uncounted after the call.
    /// `seen` may pin: no lock is held.
    pub fn each(&self, object: ObjectId, mut seen: impl FnMut(PgoffRange, OwnerId)) {
        // A block is entered under the lock before its first pin is counted: who has seen that pin
        // counted finds the block.
        let blocks = (0..).map_while(|at| self.0.lock().blocks.get(at).copied());
        for (range, owner) in blocks.flatten().filter_map(|record| record.read(object)) {
            seen(range, owner);
        }
    }

    /// Adds blocks with so many records to these, or with fewer if a thread has left some; `None`
    /// if there is no memory.
    ///
    /// A block that is larger is left alone: it was made for more pins than the caller has.
    fn supply(&self, nr_records: usize, to: &mut Vec<Block>) -> Option<()> {
        let mut nr_missing = nr_records;
        let mut registry = self.0.lock();
        while let Some(at) = registry.idle.iter().position(|block| block.len() <= nr_missing) {
            to.try_reserve(1).ok()?;
            let block = registry.idle.swap_remove(at);
            nr_missing -= block.len();
            to.push(block);
        }
        drop(registry);
        if nr_missing < nr_records {
            return Some(());
        }

        let mut block = Vec::new();
        block.try_reserve_exact(nr_records).ok()?;
        block.resize_with(nr_records, Record::new);

        to.try_reserve(1).ok()?;
        let mut registry = self.0.lock();
        let Registry { blocks, idle } = &mut *registry;
        blocks.try_reserve(1).ok()?;
        idle.try_reserve(blocks.len() + 1 - idle.len()).ok()?;
        let block: Block = block.leak();
        blocks.push(block);
        to.push(block);
        Some(())
    }
}

impl Default for Holders {
    fn default() -> Self {
        Self::new()
    }
}

/// One thread's records.
///
/// It goes round its blocks and takes what it finds free. It does not follow what is cleared, which
/// happens on other threads, too. At the end of each block: if a quarter of the records visited in
/// this round were free, the next round begins, with the first block again; a thread with few pins
/// stays in few cache lines, whatever it once held. If not, it goes on to the next block; after the
/// last one it doubles their number. So a note looks at four records on average, or at one more for
/// each of those that growing adds. And growing means that three quarters were live at once, at the
/// beginning of the round: the blocks of a thread are bounded by the most pins it ever had.
#[derive(Debug)]
pub struct Records {
    /// The current block, and how far it has come in there.
    block: Cell<Block>,
    next: Cell<usize>,
    /// How many of those visited in this round were live.
    nr_skipped: Cell<usize>,
    round: RefCell<Round>,
    holders: Arc<Holders>,
}

#[derive(Debug)]
struct Round {
    blocks: Vec<Block>,
    /// How many blocks this round has come to, the current one included.
    nr_entered: usize,
    /// How many records there are in those.
    nr_visited: usize,
}

impl Records {
    /// Writes down a pin, before it is counted: the record is to be cleared once. `None` if there is
    /// no memory for another block.
    #[inline]
    #[must_use = "the record stays until it is cleared"]
    pub fn note(
        &self,
        object: ObjectId,
        range: PgoffRange,
        owner: OwnerId,
    ) -> Option<&'static Record> {
        let (record, free) = match self.next() {
            Some((record, Some(free))) => (record, free),
            skipped => self.search(skipped.is_some())?,
        };
        record.write(free, object, range, owner);
        Some(record)
    }

    /// The next record of the current block, and its head if it is free.
    #[inline]
    fn next(&self) -> Option<(&'static Record, Option<Head>)> {
        let record = self.block.get().get(self.next.get())?;
        self.next.set(self.next.get() + 1);
        Some((record, record.free()))
    }

    /// The next free record, after the first try, which found a live one or the end of the block.
    #[cold]
    #[inline(never)]
    fn search(&self, was_live: bool) -> Option<(&'static Record, Head)> {
        self.nr_skipped.set(self.nr_skipped.get() + usize::from(was_live));
        loop {
            match self.next() {
                Some((record, Some(free))) => return Some((record, free)),
                Some((_, None)) => self.nr_skipped.set(self.nr_skipped.get() + 1),
                None => self.enter_block()?,
            }
        }
    }

    /// At the end of a block: on to another. `None` if nothing was free in the whole round and there
    /// is no memory.
    fn enter_block(&self) -> Option<()> {
        let mut round = self.round.borrow_mut();
        let nr_found = round.nr_visited - self.nr_skipped.get();
        let is_quarter = nr_found > 0 && nr_found >= round.nr_visited / 4;
        let is_last = round.nr_entered == round.blocks.len();
        let grown = match is_last && !is_quarter {
            true => self.grow(&mut round.blocks),
            false => Some(()),
        };
        if is_quarter || grown.is_none() {
            round.nr_entered = 0;
            round.nr_visited = 0;
            self.nr_skipped.set(0);
        }
        if nr_found == 0 {
            grown?;
        }
        let block = *round.blocks.get(round.nr_entered)?;
        round.nr_entered += 1;
        round.nr_visited += block.len();
        self.block.set(block);
        self.next.set(0);
        Some(())
    }

    /// Doubles the records.
    fn grow(&self, blocks: &mut Vec<Block>) -> Option<()> {
        let nr_records: usize = blocks.iter().map(|block| block.len()).sum();
        self.holders.supply(nr_records.max(FIRST_BLOCK), blocks)
    }
}

impl Drop for Records {
    /// A pin may outlive the thread that took it: its record is skipped by whoever gets the block.
    fn drop(&mut self) {
        // Within what `supply` has reserved.
        self.holders.0.lock().idle.append(&mut self.round.get_mut().blocks);
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
