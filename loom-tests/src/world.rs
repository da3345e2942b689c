//! What a model acts on: the words, the readers and the bytes of one small object.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Mutex;

use gmem::addr::Pgoff;
use gmem::modelled::{
    Counted, Domain, Frozen, FrozenBlock, Phase, Reader, Shape, Stop, Tree, Visibility, Wait,
    Waiters, Wanted, Word,
};
use gmem::range::PgoffRange;
use loom::sync::Arc;
use loom::thread;

use crate::Memory;

/// More numbers of splits than any model uses up. An object has 8,191.
const MANY_SPLITS: u64 = 1000;

/// An object of a few pages.
///
/// It is shared through std's `Arc`, not loom's: the pointer is no part of what is modelled, and
/// loom's would add steps and an order that the code under test does not give.
#[derive(Debug)]
pub struct World(Option<Parts>);

/// What a [`World`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The words.
    pub tree: Tree,
    /// Those who sleep.
    pub waiters: Arc<Waiters>,
    /// The readers.
    pub domain: Arc<Domain>,
    /// The judge.
    pub memory: Memory,
    nr_pages: u64,
    /// Readers whose threads have ended. They go when the model does: the lock around their list would
    /// order more than the code under test.
    gone: Mutex<Vec<Reader>>,
}

impl Deref for World {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        self.0.as_ref().expect("taken only when it is dropped")
    }
}

impl Drop for World {
    /// Nothing is dropped when a model fails: some of it is loom's, and loom may be no more.
    fn drop(&mut self) {
        if thread::panicking() {
            std::mem::forget(self.0.take());
        }
    }
}

/// A pin that was taken.
#[derive(Debug)]
#[must_use = "a pin is dropped by `World::unpin`"]
pub struct Pin(PgoffRange, Counted);

impl World {
    /// What the host has left in the pages at the start.
    pub const HOST: u64 = 1;
    /// What the guest writes into pages that are private. The host never sees it.
    pub const SECRET: u64 = 2;
    /// What a conversion leaves in pages that it makes shared.
    pub const PREPARED: u64 = 3;

    /// So many pages, nobody in them, in blocks of this shape.
    ///
    /// # Panics
    /// Never: a few words are always to be had.
    pub fn new(shape: Shape, nr_pages: u64, visibility: Visibility) -> std::sync::Arc<Self> {
        let waiters = Arc::new(Waiters::new());
        let before = match visibility {
            Visibility::Shared => Self::HOST,
            Visibility::Private => Self::SECRET,
        };
        std::sync::Arc::new(Self(Some(Parts {
            tree: Tree::new(shape, visibility, &waiters).expect("a few words"),
            waiters,
            domain: Arc::new(Domain::new()),
            memory: Memory::new(nr_pages, before),
            nr_pages,
            gone: Mutex::default(),
        })))
    }

    /// One uniform block on this many levels, of two parts each: 2 pages on two levels, 4 on three.
    pub fn uniform(nr_levels: u32, visibility: Visibility) -> std::sync::Arc<Self> {
        Self::numbered(nr_levels, visibility, MANY_SPLITS)
    }

    /// The same, with so many numbers for its splits.
    pub fn numbered(
        nr_levels: u32,
        visibility: Visibility,
        nr_splits: u64,
    ) -> std::sync::Arc<Self> {
        let nr_pages = 1 << (nr_levels - 1);
        Self::new(Shape::small(nr_pages, 1, nr_levels, nr_splits), nr_pages, visibility)
    }

    /// So many uniform blocks and parts of one on this many levels, of two parts each.
    pub fn of_pages(nr_pages: u64, nr_levels: u32, visibility: Visibility) -> std::sync::Arc<Self> {
        Self::new(Shape::small(nr_pages, 1, nr_levels, MANY_SPLITS), nr_pages, visibility)
    }

    /// Up to four pages, each of which has a word of its own already.
    pub fn flat(nr_pages: u64, visibility: Visibility) -> std::sync::Arc<Self> {
        let world = Self::new(Shape::small(nr_pages, 2, 2, MANY_SPLITS), nr_pages, visibility);
        world.split(world.all());
        world
    }

    /// Gives each page of the range a word of its own.
    ///
    /// # Panics
    /// If somebody is there.
    pub fn split(&self, range: PgoffRange) {
        let reader = self.reader();
        for page in range.iter().map(|page| pages(page.get()..page.get() + 1)) {
            self.freeze(&reader, page, Wanted::All).expect("idle").thaw();
        }
    }

    /// All pages.
    pub fn all(&self) -> PgoffRange {
        pages(0..self.nr_pages)
    }

    /// A thread's place among the readers.
    pub fn reader(&self) -> Reader {
        Domain::register(&self.domain)
    }

    /// Pins a range.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn pin(&self, reader: &Reader, range: PgoffRange) -> Result<Pin, Stop> {
        Ok(Pin(range, self.tree.pin(reader, range)?))
    }

    /// Drops a pin, as its guard does.
    pub fn unpin(&self, reader: &Reader, Pin(range, counted): Pin) {
        match counted {
            Counted::InPage => self.tree.unpin_page(range.start()),
            Counted::InRange => self.tree.unpin(reader, range),
        }
    }

    /// Pins, reads the bytes and lets go again. Returns what the first page held.
    ///
    /// # Errors
    /// Where the pin stopped.
    ///
    /// # Panics
    /// If a page holds what the guest wrote in private.
    pub fn read_pinned(&self, reader: &Reader, range: PgoffRange) -> Result<u64, Stop> {
        let pin = self.pin(reader, range)?;
        for page in range.iter() {
            assert_ne!(self.memory.read(page), Self::SECRET, "pinned what is private: {page:?}");
        }
        let first = self.memory.read(range.start());
        self.unpin(reader, pin);
        Ok(first)
    }

    /// Pins, writes the bytes and lets go again.
    ///
    /// # Errors
    /// Where the pin stopped.
    pub fn write_pinned(&self, reader: &Reader, range: PgoffRange, value: u64) -> Result<(), Stop> {
        let pin = self.pin(reader, range)?;
        self.memory.write_all(range, value);
        self.unpin(reader, pin);
        Ok(())
    }

    /// Pins exclusively, writes the bytes and lets go again.
    ///
    /// # Errors
    /// Where the pin stopped.
    pub fn write_owned(&self, reader: &Reader, range: PgoffRange, value: u64) -> Result<(), Stop> {
        self.tree.pin_exclusive(reader, range)?;
        self.memory.write_all(range, value);
        self.tree.unpin_exclusive(reader, range);
        Ok(())
    }

    /// Freezes what is wanted of a range, at once or not at all.
    ///
    /// # Errors
    /// Where the freeze stopped.
    pub fn freeze(
        &self,
        reader: &Reader,
        range: PgoffRange,
        wanted: Wanted,
    ) -> Result<Frozen<'_>, Stop> {
        self.tree.freeze(reader, &[range], wanted, &Wait::never())
    }

    /// Steps 3, 4, 7 and 8 of a conversion, as the object takes them: freeze, wait for transient
    /// accesses, change the bytes, publish. Blocks all of whose parts are held are merged.
    ///
    /// # Errors
    /// Where the freeze stopped.
    pub fn convert(&self, reader: &Reader, range: PgoffRange, to: Visibility) -> Result<(), Stop> {
        self.convert_waiting(reader, range, to, &Wait::never())
    }

    /// The same with time to wait for others.
    ///
    /// # Errors
    /// Where the freeze stopped.
    ///
    /// # Panics
    /// If the barrier is refused, which under loom it never is.
    pub fn convert_waiting(
        &self,
        reader: &Reader,
        range: PgoffRange,
        to: Visibility,
        wait: &Wait,
    ) -> Result<(), Stop> {
        let frozen = match self.freeze_block(reader, range, to) {
            Some(Ok(block)) => {
                if to == Visibility::Private {
                    assert!(reader.wait_for_others());
                }
                self.prepare(&[range], to);
                ManuallyDrop::into_inner(block).release(to);
                return Ok(());
            }
            Some(Err(frozen)) => frozen,
            None => self.tree.freeze(reader, &[range], Wanted::Other(to), wait)?,
        };
        if frozen.runs().is_empty() {
            frozen.thaw();
            return Ok(());
        }
        let mut frozen = kept(frozen);
        if to == Visibility::Private {
            assert!(frozen.wait_for_sections(reader));
        }
        self.prepare(frozen.runs(), to);
        if to == Visibility::Shared && frozen.could_merge() {
            assert!(frozen.wait_for_sections(reader));
        }
        ManuallyDrop::into_inner(frozen).release(to);
        Ok(())
    }

    /// The same without the wait, and so without a merge: for models that have no transient access. The
    /// lock and the fence inside the wait would order what there the words alone have to order.
    ///
    /// # Errors
    /// Where the freeze stopped.
    pub fn convert_without_readers(
        &self,
        reader: &Reader,
        range: PgoffRange,
        to: Visibility,
    ) -> Result<(), Stop> {
        let frozen = kept(match self.freeze_block(reader, range, to) {
            Some(Ok(block)) => {
                self.prepare(&[range], to);
                ManuallyDrop::into_inner(block).release(to);
                return Ok(());
            }
            Some(Err(frozen)) => frozen,
            None => self.freeze(reader, range, Wanted::Other(to))?,
        });
        self.prepare(frozen.runs(), to);
        ManuallyDrop::into_inner(frozen).release(to);
        Ok(())
    }

    /// Steps 4, 7 and 8 of a conversion to private.
    ///
    /// # Panics
    /// If the barrier is refused, which under loom it never is.
    pub fn make_private(&self, reader: &Reader, frozen: Frozen<'_>) {
        let mut frozen = kept(frozen);
        assert!(frozen.wait_for_sections(reader));
        self.prepare(frozen.runs(), Visibility::Private);
        ManuallyDrop::into_inner(frozen).release(Visibility::Private);
    }

    /// What the object tries first: a range that is one block. If that stays one, it is all that is held.
    fn freeze_block(
        &self,
        reader: &Reader,
        range: PgoffRange,
        to: Visibility,
    ) -> Option<Result<ManuallyDrop<FrozenBlock<'_>>, Frozen<'_>>> {
        let block = kept(self.tree.freeze_block(reader, range, Wanted::Other(to))?);
        Some(match block.could_merge() {
            true => Err(ManuallyDrop::into_inner(block).into_frozen()),
            false => Ok(block),
        })
    }

    fn prepare(&self, runs: &[PgoffRange], to: Visibility) {
        let left = match to {
            Visibility::Shared => Self::PREPARED,
            Visibility::Private => Self::SECRET,
        };
        runs.iter().for_each(|&run| self.memory.write_all(run, left));
    }

    /// Whether the host may touch a range, asked as the object asks: of a page by its own word first.
    fn open(&self, range: PgoffRange) -> Option<()> {
        match range.nr_pages() {
            1 => self.tree.is_open(range.start()).then_some(()),
            _ => self.tree.check_open(range).ok(),
        }
    }

    /// A transient read of a range, as the object makes it: `None` if the host may not.
    pub fn read_in_section(&self, reader: &Reader, range: PgoffRange) -> Option<u64> {
        let _section = reader.enter();
        self.open(range)?;
        Some(self.memory.read_all(range))
    }

    /// A transient write to a range: `None` if the host may not.
    pub fn write_in_section(&self, reader: &Reader, range: PgoffRange, value: u64) -> Option<()> {
        let _section = reader.enter();
        self.open(range)?;
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
            assert_eq!(self.tree.load(page), Some(Word::new(visibility)), "{page:?}");
        }
    }

    /// Checks that nobody is anywhere, and that what is private holds what the guest wrote, and what is
    /// shared does not.
    ///
    /// # Panics
    /// If it is not so.
    pub fn expect_whole(&self) {
        for page in self.all().iter() {
            let word = self.tree.load(page).expect("a page");
            assert_eq!(word, Word::new(word.visibility()), "{page:?} is not idle");
            let is_secret = self.memory.read(page) == Self::SECRET;
            let is_private = word.visibility() == Visibility::Private;
            assert_eq!(is_secret, is_private, "{page:?} not what its word says");
        }
    }

    /// Checks that the range is quarantined.
    ///
    /// # Panics
    /// If a word says otherwise.
    pub fn expect_quarantined(&self, range: PgoffRange) {
        for page in range.iter() {
            let phase = self.tree.load(page).map(Word::phase);
            assert_eq!(phase, Some(Phase::Quarantined), "{page:?}");
        }
    }
}

/// Not dropped by a judge that fails: that would quarantine what is frozen, and fail once more where
/// loom is no more.
fn kept<T>(frozen: T) -> ManuallyDrop<T> {
    ManuallyDrop::new(frozen)
}

/// Two threads at once, each a reader since before the other began. Returns what they return.
pub fn together<A: 'static, B>(
    world: &std::sync::Arc<World>,
    one: impl FnOnce(&World, &Reader) -> A + 'static,
    own: impl FnOnce(&World, &Reader) -> B,
) -> (A, B) {
    let [first, second] = [(); 2].map(|()| Place::of(world));
    let one = spawn(world, first, one);
    let own = own(world, second.reader());
    let one = join(world, one);
    second.keep(world);
    (one, own)
}
/// Three threads at once.
pub fn three_together<A: 'static, B: 'static, C>(
    world: &std::sync::Arc<World>,
    one: impl FnOnce(&World, &Reader) -> A + 'static,
    other: impl FnOnce(&World, &Reader) -> B + 'static,
    own: impl FnOnce(&World, &Reader) -> C,
) -> (A, B, C) {
    let [first, second, third] = [(); 3].map(|()| Place::of(world));
    let one = spawn(world, first, one);
    let other = spawn(world, second, other);
    let own = own(world, third.reader());
    let (one, other) = (join(world, one), join(world, other));
    third.keep(world);
    (one, other, own)
}

/// A reader that is not dropped when its thread panics: it would lock the list of readers, and let others
/// run, where one panic more aborts the process.
struct Place(ManuallyDrop<Reader>);

impl Place {
    fn of(world: &World) -> Self {
        Self(ManuallyDrop::new(world.reader()))
    }

    fn reader(&self) -> &Reader {
        &self.0
    }

    fn keep(self, world: &World) {
        let mut gone = world.gone.lock().expect("no thread of the model panicked");
        gone.push(ManuallyDrop::into_inner(self.0));
    }
}

type Running<T> = thread::JoinHandle<(T, Place)>;

fn spawn<T: 'static>(
    world: &std::sync::Arc<World>,
    place: Place,
    work: impl FnOnce(&World, &Reader) -> T + 'static,
) -> Running<T> {
    let world = std::sync::Arc::clone(world);
    thread::spawn(move || (work(&world, place.reader()), place))
}

fn join<T>(world: &World, running: Running<T>) -> T {
    let (result, place) = running.join().expect("a thread of the model panicked");
    place.keep(world);
    result
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
