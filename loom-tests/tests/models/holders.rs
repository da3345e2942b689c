//! Who holds a pin: records that are written without a lock, and a query that reads them meanwhile.
//!
//! A thread's block has one record here, so the next note uses it again or finds it taken and has
//! to add a block. Blocks are registered before the threads part, and `Records` are given back for
//! the main thread to drop, except where that is the question: the lock would order more than the
//! records do.

use gmem::modelled::{Holders, LoneWord, ObjectId, OwnerId, Records, Visibility, Word};
use gmem::range::PgoffRange;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;
use loom_tests::{explore, must_be_caught, pages};

/// Pages and owner of a pin.
type Pin = (PgoffRange, OwnerId);

/// A pin that differs from the other one in all that is written down.
fn first() -> Pin {
    (pages(1..3), OwnerId(5))
}

/// As above.
fn second() -> Pin {
    (pages(4..9), OwnerId(6))
}

/// What a query says, in the order of the records.
fn seen(holders: &Holders, object: ObjectId) -> Vec<Pin> {
    let mut seen = Vec::new();
    holders.each(object, |range, owner| seen.push((range, owner)));
    seen
}

fn note(
    records: &Records,
    object: ObjectId,
    (range, owner): Pin,
) -> &'static gmem::modelled::Record {
    records.note(object, range, owner).expect("memory for a record")
}

/// Proves: a query during the reuse of a record sees the pin of before, that of after, or none.
#[test]
fn reuse() {
    explore(|| {
        let object = ObjectId::new_unique();
        let holders = Arc::new(Holders::new());
        let records = Holders::register(&holders);
        let record = note(&records, object, first());
        let owner = thread::spawn(move || {
            record.clear();
            note(&records, object, second());
            records
        });
        let found = seen(&holders, object);
        assert!(found.is_empty() || found == [first()] || found == [second()], "{found:?}");
        let _records = owner.join().unwrap();
        assert_eq!(seen(&holders, object), [second()]);
    });
}

/// Proves: a record that goes to a pin of another object is never reported for the wrong one.
#[test]
fn reuse_for_another_object() {
    explore(|| {
        let (before, after) = (ObjectId::new_unique(), ObjectId::new_unique());
        let holders = Arc::new(Holders::new());
        let records = Holders::register(&holders);
        let record = note(&records, before, first());
        let owner = thread::spawn(move || {
            record.clear();
            note(&records, after, second());
            records
        });
        let found = seen(&holders, before);
        assert!(found.is_empty() || found == [first()], "{found:?}");
        let found = seen(&holders, after);
        assert!(found.is_empty() || found == [second()], "{found:?}");
        let _records = owner.join().unwrap();
    });
}

/// Proves: a record used twice over is never mixed from any two of its three pins.
#[test]
fn reuse_twice() {
    explore(|| {
        let object = ObjectId::new_unique();
        let third = (pages(10..20), OwnerId(5));
        let holders = Arc::new(Holders::new());
        let records = Holders::register(&holders);
        let record = note(&records, object, first());
        let owner = thread::spawn(move || {
            record.clear();
            note(&records, object, second()).clear();
            note(&records, object, third);
            records
        });
        let found = seen(&holders, object);
        let is_whole = found.iter().all(|pin| [first(), second(), third].contains(pin));
        assert!(is_whole && found.len() <= 1, "{found:?}");
        let _records = owner.join().unwrap();
    });
}

/// Proves: a record that another thread clears while its owner looks for a free one is used again
/// or left alone, and is never mixed from two pins.
#[test]
fn cleared_by_another_thread() {
    explore(|| {
        let object = ObjectId::new_unique();
        let holders = Arc::new(Holders::new());
        let records = Holders::register(&holders);
        let record = note(&records, object, first());
        let guard = thread::spawn(move || record.clear());
        let owner = thread::spawn(move || {
            note(&records, object, second());
            records
        });
        let found = seen(&holders, object);
        let (of_first, of_second): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|pin| *pin == first());
        assert!(of_first.len() <= 1, "{of_first:?}");
        assert!(of_second.is_empty() || of_second == [second()], "{of_second:?}");
        guard.join().unwrap();
        let _records = owner.join().unwrap();
        assert_eq!(seen(&holders, object), [second()]);
    });
}

/// Proves: whoever has seen a pin counted finds who holds it, also if it is the first of its thread.
#[test]
fn counted_is_found() {
    explore(|| {
        let object = ObjectId::new_unique();
        let holders = Arc::new(Holders::new());
        let cell = Arc::new(LoneWord::new(Visibility::Shared));
        let pinner = {
            let (holders, cell) = (Arc::clone(&holders), Arc::clone(&cell));
            thread::spawn(move || {
                let records = Holders::register(&holders);
                note(&records, object, first());
                cell.step(Word::pin).unwrap();
                records
            })
        };
        if cell.load().pins() == 1 {
            assert_eq!(seen(&holders, object), [first()]);
        }
        let _records = pinner.join().unwrap();
    });
}

/// Proves: the same of a record that was used before, and the pin of before is not found any more.
#[test]
fn counted_is_found_in_a_reused_record() {
    explore(|| counted_after_reuse(Seed::None));
}

/// Proves: whoever does not find a pin any more sees it uncounted.
#[test]
fn not_found_is_not_counted() {
    explore(|| released(Seed::None));
}

/// Proves: the same when a pin of the same object has the record now, or is about to.
#[test]
fn not_found_is_not_counted_with_another_pin_there() {
    explore(|| {
        let object = ObjectId::new_unique();
        released_and_reused(object, object);
    });
}

/// Proves: the same when a pin of another object has it.
#[test]
fn not_found_is_not_counted_with_another_object_there() {
    explore(|| released_and_reused(ObjectId::new_unique(), ObjectId::new_unique()));
}

fn released_and_reused(before: ObjectId, after: ObjectId) {
    let holders = Arc::new(Holders::new());
    let records = Holders::register(&holders);
    let record = note(&records, before, first());
    let cell = Arc::new(LoneWord::new(Visibility::Shared));
    cell.step(Word::pin).unwrap();
    let guard = {
        let cell = Arc::clone(&cell);
        thread::spawn(move || {
            cell.step(Word::unpin).unwrap();
            record.clear();
        })
    };
    let owner = thread::spawn(move || {
        note(&records, after, second());
        records
    });
    if !seen(&holders, before).contains(&first()) {
        assert_eq!(cell.load().pins(), 0, "{MISSED}");
    }
    guard.join().unwrap();
    let _records = owner.join().unwrap();
}

/// Proves: a block that its thread leaves behind with a live record gives it to one pin at a time,
/// and no record is lost.
#[test]
fn handed_on() {
    explore(|| {
        let object = ObjectId::new_unique();
        let holders = Arc::new(Holders::new());
        let records = Holders::register(&holders);
        let record = note(&records, object, first());
        let ending = thread::spawn(move || drop(records));
        let heir = {
            let holders = Arc::clone(&holders);
            thread::spawn(move || {
                let records = Holders::register(&holders);
                note(&records, object, second());
                records
            })
        };
        record.clear();
        let found = seen(&holders, object);
        assert!(found.is_empty() || found == [second()], "{found:?}");
        ending.join().unwrap();
        let _records = heir.join().unwrap();
        assert_eq!(seen(&holders, object), [second()]);
    });
}

/// What a canary does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seed {
    None,
    /// The pin is counted before it is written down, and uncounted after it is cleared.
    WordFirst,
    /// The head is made live before the fields are written.
    HeadFirst,
    /// A second life has the head of the first.
    SameHead,
    /// The query does not look at the head again.
    OneLook,
    /// The second look may come before the fields.
    NoFence,
    /// A field does not say that the life before has ended.
    RelaxedField,
    /// The clear does not say that the pin is uncounted.
    RelaxedClear,
    /// The owner does not listen to what the clear says.
    RelaxedReuse,
    /// The second look of the query does not.
    RelaxedLook,
}

fn counted_after_reuse(seed: Seed) {
    let object = ObjectId::new_unique();
    let holders = Arc::new(Holders::new());
    let records = Holders::register(&holders);
    let record = note(&records, object, first());
    let cell = Arc::new(LoneWord::new(Visibility::Shared));
    let pinner = {
        let cell = Arc::clone(&cell);
        thread::spawn(move || {
            record.clear();
            if seed == Seed::WordFirst {
                cell.step(Word::pin).unwrap();
                note(&records, object, second());
            } else {
                note(&records, object, second());
                cell.step(Word::pin).unwrap();
            }
            records
        })
    };
    if cell.load().pins() == 1 {
        assert_eq!(seen(&holders, object), [second()], "{MISSED}");
    }
    let _records = pinner.join().unwrap();
}

fn released(seed: Seed) {
    let object = ObjectId::new_unique();
    let holders = Arc::new(Holders::new());
    let records = Holders::register(&holders);
    let record = note(&records, object, first());
    let cell = Arc::new(LoneWord::new(Visibility::Shared));
    cell.step(Word::pin).unwrap();
    let guard = {
        let cell = Arc::clone(&cell);
        thread::spawn(move || {
            if seed == Seed::WordFirst {
                record.clear();
                cell.step(Word::unpin).unwrap();
            } else {
                cell.step(Word::unpin).unwrap();
                record.clear();
            }
        })
    };
    if seen(&holders, object).is_empty() {
        assert_eq!(cell.load().pins(), 0, "{MISSED}");
    }
    guard.join().unwrap();
}

/// Seed: the pin is counted before it is written down.
#[test]
fn canary_counted_before_noted() {
    must_be_caught(MISSED, || counted_after_reuse(Seed::WordFirst));
}

/// Seed: the record is cleared before the pin is uncounted.
#[test]
fn canary_cleared_before_uncounted() {
    must_be_caught(MISSED, || released(Seed::WordFirst));
}

/// Loom's atomic with a store before each access, as in `src/sync/modelled.rs`.
struct Turned {
    value: AtomicU64,
    turn: AtomicU64,
}

impl Turned {
    fn new(value: u64) -> Self {
        Self { value: AtomicU64::new(value), turn: AtomicU64::new(0) }
    }

    fn load(&self, order: Ordering) -> u64 {
        // Relaxed: pairs with nothing, and must not.
        self.turn.store(0, Ordering::Relaxed);
        self.value.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        // Relaxed: as above.
        self.turn.store(0, Ordering::Relaxed);
        self.value.store(value, order);
    }
}

/// A record of two fields and the word of its pin, by hand: the real one leaves no way to do it
/// wrong.
struct Bare {
    head: Turned,
    fields: [Turned; 2],
    word: Turned,
    seed: Seed,
}

impl Bare {
    /// Live, with the first pin, who is counted.
    fn new(seed: Seed) -> Self {
        Self { head: Turned::new(1), fields: [1, 1].map(Turned::new), word: Turned::new(1), seed }
    }

    fn unless(&self, seed: Seed, order: Ordering) -> Ordering {
        // Relaxed: the seed.
        if self.seed == seed { Ordering::Relaxed } else { order }
    }

    fn clear(&self) {
        // Relaxed: what the clear says covers it.
        self.word.store(0, Ordering::Relaxed);
        // Release: pairs with the Acquire in `reuse` and both in `read`.
        self.head.store(2, self.unless(Seed::RelaxedClear, Ordering::Release));
    }

    /// Gives the record to the second pin, if it is free.
    fn reuse(&self) {
        // Acquire: pairs with the Release in `clear`.
        if self.head.load(self.unless(Seed::RelaxedReuse, Ordering::Acquire)) == 1 {
            return;
        }
        let next = if self.seed == Seed::SameHead { 1 } else { 3 };
        if self.seed == Seed::HeadFirst {
            // Release: pairs with the Acquire in `read`; the bug is that it comes too early.
            self.head.store(next, Ordering::Release);
        }
        for field in &self.fields {
            // Release: pairs with the fence in `read`.
            field.store(2, self.unless(Seed::RelaxedField, Ordering::Release));
        }
        // Release: pairs with the Acquire in `read`.
        self.head.store(next, Ordering::Release);
    }

    fn read(&self) -> Option<[u64; 2]> {
        // Acquire: pairs with the Release in `reuse` and in `clear`.
        let head = self.head.load(Ordering::Acquire);
        if head == 2 {
            return None;
        }
        // Relaxed: the fence and the second look make it good.
        let fields = [0, 1].map(|at| self.fields[at].load(Ordering::Relaxed));
        if self.seed != Seed::NoFence {
            // Acquire: pairs with the Release of the fields in `reuse`.
            fence(Ordering::Acquire);
        }
        // Acquire: pairs with the Release in `clear`.
        let again = self.head.load(self.unless(Seed::RelaxedLook, Ordering::Acquire));
        (again == head || self.seed == Seed::OneLook).then_some(fields)
    }
}

/// What a canary dies of: a query reports what never was.
const MIXED: &str = "mixed from two pins";
/// Or it misses a pin that is held.
const MISSED: &str = "counted, and not found";

/// A record is cleared by one thread, reused by another, and read by a third.
fn bare(seed: Seed) {
    let record = Arc::new(Bare::new(seed));
    let guard = {
        let record = Arc::clone(&record);
        thread::spawn(move || record.clear())
    };
    let owner = {
        let record = Arc::clone(&record);
        thread::spawn(move || record.reuse())
    };
    let found = record.read();
    assert!(matches!(found, None | Some([1, 1] | [2, 2])), "{MIXED}");
    if found != Some([1, 1]) {
        // Relaxed: it is the record that must have told.
        assert_eq!(record.word.load(Ordering::Relaxed), 0, "{MISSED}");
    }
    guard.join().unwrap();
    owner.join().unwrap();
}

/// Shows that the canaries below die of their seeds: the same model without one passes.
#[test]
fn bare_record_without_a_seed() {
    explore(|| bare(Seed::None));
}

/// Seed: the head is made live before the fields are written.
#[test]
fn canary_head_before_fields() {
    must_be_caught(MIXED, || bare(Seed::HeadFirst));
}

/// Seed: the count of a head stays the same from life to life.
#[test]
fn canary_same_head() {
    must_be_caught(MIXED, || bare(Seed::SameHead));
}

/// Seed: the query looks at the head once.
#[test]
fn canary_one_look() {
    must_be_caught(MIXED, || bare(Seed::OneLook));
}

/// Seed: nothing keeps the second look behind the fields.
#[test]
fn canary_no_fence() {
    must_be_caught(MIXED, || bare(Seed::NoFence));
}

/// Seed: the fields are stored without Release.
#[test]
fn canary_relaxed_fields() {
    must_be_caught(MIXED, || bare(Seed::RelaxedField));
}

/// Seed: the clear is stored without Release.
#[test]
fn canary_relaxed_clear() {
    must_be_caught(MISSED, || bare(Seed::RelaxedClear));
}

/// Seed: the owner looks for a free record without Acquire.
#[test]
fn canary_relaxed_reuse() {
    must_be_caught(MISSED, || bare(Seed::RelaxedReuse));
}

/// Seed: the query looks at the head again without Acquire.
#[test]
fn canary_relaxed_look() {
    must_be_caught(MISSED, || bare(Seed::RelaxedLook));
}
