//! A device reaches pages until its subscriber has let go: questions and answers, ends of waits, and a
//! subscriber that registers while pages change sides.
//!
//! The object's own steps around the line are written out here, as [`World`] writes out those of a conversion: a
//! mapping is a flag behind the lock that a transfer holds from its look to the end of its copy.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::time::Instant;

use gmem::modelled::{
    Ack, Flaw, Heard, Line, Outcome, Question, Reader, Standing, Visibility, Wanted,
};
use loom::sync::{Arc, Mutex, RwLock};
use loom::thread;
use loom_tests::together;
use loom_tests::{Memory, World, explore, explore_on, must_be_caught, must_notice, page, pages};

use crate::RACE;
use Visibility::{Private, Shared};

/// A page, a line to the one who maps it, and the mapping.
struct Machine {
    memory: Memory,
    line: Arc<Line>,
    mapped: Mutex<bool>,
}

/// Not dropped when a model fails, as with [`World`].
struct Kept<T>(Option<T>);

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("taken only when it is dropped")
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if thread::panicking() {
            std::mem::forget(self.0.take());
        }
    }
}

type Common<T> = std::sync::Arc<Kept<T>>;

fn common<T>(it: T) -> Common<T> {
    std::sync::Arc::new(Kept(Some(it)))
}

impl Machine {
    fn new() -> Common<Self> {
        let line = Arc::new(Line::new());
        common(Self { memory: Memory::new(2, World::HOST), line, mapped: Mutex::new(true) })
    }

    fn ask(&self) -> (Question, Ack) {
        Line::ask(&self.line).expect("a few bytes")
    }

    /// A transfer, if the page is mapped.
    fn dma(&self, at: u64) {
        let mapped = self.mapped.lock().expect("nobody panics with it");
        if *mapped {
            self.memory.write(page(at), World::HOST);
        }
    }

    fn map(&self, mapped: bool) {
        *self.mapped.lock().expect("nobody panics with it") = mapped;
    }

    /// The guest has the page, and nobody else reaches it.
    fn guest_writes(&self, at: u64) {
        self.memory.write(page(at), World::SECRET);
    }
}

fn now() -> Option<Instant> {
    Some(Instant::now())
}

fn end<T>(running: thread::JoinHandle<T>) -> T {
    running.join().expect("a thread of the model panicked")
}

/// Whoever waits, somebody who answers when the mapping is gone, and a device.
fn answer_and_transfer(answer: impl Fn(&Machine, Ack) + Copy + 'static) {
    let machine = Machine::new();
    let (question, ack) = machine.ask();
    let keeper = {
        let machine = machine.clone();
        thread::spawn(move || answer(&machine, ack))
    };
    let device = {
        let machine = machine.clone();
        thread::spawn(move || machine.dma(0))
    };
    assert_eq!(question.wait(None), Outcome::LetGo);
    machine.guest_writes(0);
    end(keeper);
    end(device);
}

/// Proves: after the answer no transfer reaches the page, and all before it have ended.
#[test]
fn no_transfer_after_the_answer() {
    explore(|| {
        answer_and_transfer(|machine, ack| {
            machine.map(false);
            assert_eq!(ack.let_go(), Heard::InTime);
        });
    });
}

/// Seed: the answer comes before the mapping is gone.
#[test]
fn canary_answers_too_early() {
    must_be_caught(RACE, || {
        answer_and_transfer(|machine, ack| {
            let _ = ack.let_go();
            machine.map(false);
        });
    });
}

/// An answer at the moment in which it is given up on.
fn late(_: u32) {
    let machine = Machine::new();
    let (question, ack) = machine.ask();
    let keeper = thread::spawn(move || ack.let_go());
    let outcome = question.wait(now());
    let heard = end(keeper);
    assert_eq!(outcome == Outcome::LetGo, heard == Heard::InTime, "two stories: {heard:?}");
}

/// Proves: who waits and who answers agree on whether the answer was in time.
#[test]
fn timeout_or_answer() {
    explore_on(&[1], late);
}

/// Seed: the question is over some time after the look.
#[test]
fn canary_gives_up_after_the_look() {
    must_notice(Flaw::GivesUpAfterTheLook, "two stories", &[1], late);
}

/// A question is given up on, and the next one is asked while its answer is on the way.
fn next(_: u32) {
    let machine = Machine::new();
    let (first, late) = machine.ask();
    let keeper = thread::spawn(move || late.let_go());
    let first = first.wait(now());
    let (second, unused) = machine.ask();
    let second = second.wait(now());
    let heard = end(keeper);
    drop(unused);
    assert_eq!(second, Outcome::Silent, "nobody has answered this");
    assert_eq!(first == Outcome::LetGo, heard == Heard::InTime);
}

/// Proves: a late answer is never taken for the answer to a later question.
#[test]
fn late_answer_and_next_question() {
    explore_on(&[1], next);
}

/// Seed: questions have no numbers.
#[test]
fn canary_questions_without_numbers() {
    must_notice(Flaw::QuestionsWithoutNumbers, "nobody has answered this", &[1], next);
}

/// Two conversions wait for one subscriber; one of them gives up and has it cut off.
fn fence(cut: impl Fn(&Machine) + Copy + 'static) {
    let machine = Machine::new();
    let ((one, first), (other, second)) = (machine.ask(), machine.ask());
    let waits = {
        let machine = machine.clone();
        thread::spawn(move || {
            let outcome = other.wait(None);
            machine.guest_writes(1);
            outcome
        })
    };
    let device = {
        let machine = machine.clone();
        thread::spawn(move || machine.dma(1))
    };
    let outcome = one.wait(now());
    cut(&machine);
    machine.guest_writes(0);
    let other = end(waits);
    end(device);
    drop((first, second));
    assert_eq!((outcome, other), (Outcome::Silent, Outcome::LetGo));
}

/// Proves: who waits for a subscriber that another one has fenced off goes on, and no transfer reaches
/// its pages.
#[test]
fn fenced_off_by_another() {
    explore(|| {
        fence(|machine| {
            let cut = machine.line.cut_off(|| {
                machine.map(false);
                Ok::<(), Never>(())
            });
            assert_eq!(cut, Ok(()));
        });
    });
}

/// Seed: others are told before it is done.
#[test]
fn canary_fenced_off_in_words_only() {
    must_be_caught(RACE, || {
        fence(|machine| {
            assert_eq!(machine.line.cut_off(|| Ok::<(), Never>(())), Ok(()));
            machine.map(false);
        });
    });
}

/// A fence that cannot fail.
#[derive(Debug, PartialEq)]
enum Never {}

/// A subscriber of two pages, with what it maps of them.
struct Pair {
    line: Line,
    mapped: Mutex<[bool; 2]>,
}

impl Pair {
    fn map(&self, at: usize) {
        self.mapped.lock().expect("nobody panics with it")[at] = true;
    }

    fn unmap_all(&self) {
        *self.mapped.lock().expect("nobody panics with it") = [false; 2];
    }

    fn is_cut_off(&self) {
        let mapped = *self.mapped.lock().expect("nobody panics with it");
        assert_eq!(mapped, [false; 2], "it reaches pages behind its fence");
    }

    /// In batches of one.
    fn give_both(&self) {
        (0..2).for_each(|at| self.line.give(|| self.map(at)));
    }

    fn cut_off(&self) {
        let fence = || {
            self.unmap_all();
            Ok::<(), Never>(())
        };
        assert_eq!(self.line.cut_off(fence), Ok(()));
    }
}

/// A conversion gives what it has shared, while another one has the subscriber cut off.
fn give_and_fence(give: impl Fn(&Pair) + Copy + 'static, cut_off: impl Fn(&Pair) + Copy + 'static) {
    let pair = common(Pair { line: Line::new(), mapped: Mutex::new([false; 2]) });
    let gives = {
        let pair = pair.clone();
        thread::spawn(move || give(&pair))
    };
    cut_off(&pair);
    pair.is_cut_off();
    end(gives);
    // From here on nobody asks it for anything.
    pair.is_cut_off();
}

fn batches_and_fence(_: u32) {
    give_and_fence(Pair::give_both, Pair::cut_off);
}

/// Proves: when a subscriber has been cut off it reaches nothing, whoever was giving it what in the middle of
/// how many batches, and is given nothing more.
#[test]
fn grants_and_fence() {
    explore_on(&[1], batches_and_fence);
}

/// Seed: a batch is given because of a look before it.
#[test]
fn canary_gives_on_an_earlier_look() {
    must_notice(Flaw::GivesOnAnEarlierLook, "behind its fence", &[1], batches_and_fence);
}

/// Seeds: one look for all batches; a fence that others hear of later.
#[test]
fn canary_gives_behind_the_fence() {
    must_be_caught("behind its fence", || {
        let looks_once = |pair: &Pair| {
            if pair.line.standing() == Standing::Told {
                (0..2).for_each(|at| pair.map(at));
            }
        };
        give_and_fence(looks_once, Pair::cut_off);
    });
    must_be_caught("behind its fence", || {
        let tells_late = |pair: &Pair| {
            pair.unmap_all();
            assert_eq!(pair.line.cut_off(|| Ok::<(), Never>(())), Ok(()));
        };
        give_and_fence(Pair::give_both, tells_late);
    });
}

/// Proves: a wait ends when the subscription is dropped, or with the means to answer.
#[test]
fn nobody_is_left_to_answer() {
    explore(|| {
        let machine = Machine::new();
        let ((one, kept), (other, lost)) = (machine.ask(), machine.ask());
        let leaves = {
            let machine = machine.clone();
            thread::spawn(move || {
                drop(lost);
                machine.line.leave();
            })
        };
        assert_eq!(other.wait(None), Outcome::Silent);
        assert_eq!(one.wait(None), Outcome::Silent);
        end(leaves);
        assert_eq!(kept.let_go(), Heard::TooLate);
    });
}

/// The layout: the mappings of those who are subscribed, behind a lock.
type Layout = RwLock<Vec<std::sync::Arc<Mutex<bool>>>>;

/// What a conversion and a registration do wrong.
#[derive(Clone, Copy, PartialEq)]
enum Seed {
    Nothing,
    /// The conversion lets go of the layout before it has published.
    UnlocksEarly,
    /// The newcomer looks at the words before it has the layout.
    LooksEarly,
}

fn is_shared(world: &World) -> bool {
    world.tree.load(page(0)).is_some_and(|word| word.visibility() == Shared)
}

fn register(world: &World, layout: &Layout, seed: Seed) -> std::sync::Arc<Mutex<bool>> {
    let early = is_shared(world);
    let mut layout = layout.write().expect("nobody panics with it");
    let shared = if seed == Seed::LooksEarly { early } else { is_shared(world) };
    let mapped = std::sync::Arc::new(Mutex::new(shared));
    layout.push(mapped.clone());
    mapped
}

fn to_private(world: &World, reader: &Reader, layout: &Layout, seed: Seed) {
    let frozen = world.freeze(reader, pages(0..1), Wanted::Other(Private)).expect("no pins");
    let frozen = ManuallyDrop::new(frozen);
    let locked = layout.read().expect("nobody panics with it");
    for mapped in locked.iter() {
        *mapped.lock().expect("nobody panics with it") = false;
    }
    world.memory.write(page(0), World::SECRET);
    if seed == Seed::UnlocksEarly {
        drop(locked);
        ManuallyDrop::into_inner(frozen).release(Private);
        return;
    }
    ManuallyDrop::into_inner(frozen).release(Private);
    drop(locked);
}

fn newcomer(seed: Seed) {
    let world = World::flat(2, Shared);
    let layout = common(Layout::default());
    let mine = layout.clone();
    let (mapped, ()) = together(
        &world,
        move |world, _| {
            let mapped = register(world, &mine, seed);
            let locked = mapped.lock().expect("nobody panics with it");
            if *locked {
                assert_ne!(world.memory.read(page(0)), World::SECRET, "a device has read a secret");
            }
            drop(locked);
            mapped
        },
        |world, reader| to_private(world, reader, &layout, seed),
    );
    assert!(!*mapped.lock().expect("nobody panics with it"), "a private page stays mapped");
}

/// Proves: whoever registers while a page turns private has it taken away, or never gets it.
#[test]
fn registration_and_conversion() {
    explore(|| newcomer(Seed::Nothing));
}

/// Seeds: the layout is unlocked too early, or looked at too early.
#[test]
fn canary_registers_in_between() {
    const SYMPTOMS: &str = "Causality violation|a device has read a secret|stays mapped";
    must_be_caught(SYMPTOMS, || newcomer(Seed::UnlocksEarly));
    must_be_caught(SYMPTOMS, || newcomer(Seed::LooksEarly));
}
