//! Is the exploration itself whole? Loom alone loses orders in which a compare-and-swap loop comes
//! before another thread's load; `src/sync/modelled.rs` says why, and keeps them.

use gmem::modelled::{LoneWord, Visibility, Word};
use loom::thread;
use loom_tests::explore;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// Proves: a thread that loads a word is run before and after another thread's step of that word.
#[test]
fn both_orders_of_a_load_and_a_step() {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let seen_by_model = Arc::clone(&seen);
    explore(move || {
        let cell = Arc::new(LoneWord::new(Visibility::Shared));
        let pinner = {
            let cell = Arc::clone(&cell);
            thread::spawn(move || cell.step(Word::pin).unwrap())
        };
        seen_by_model.lock().unwrap().insert(cell.load().pins());
        pinner.join().unwrap();
    });
    assert_eq!(*seen.lock().unwrap(), BTreeSet::from([0, 1]));
}

/// Proves: every order of three steps of one word is run.
#[test]
fn all_orders_of_three_steps() {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let seen_by_model = Arc::clone(&seen);
    explore(move || {
        let cell = Arc::new(LoneWord::new(Visibility::Shared));
        // How many pins a thread found tells its place.
        let others = [(); 2].map(|()| {
            let cell = Arc::clone(&cell);
            thread::spawn(move || cell.step(Word::pin).unwrap().pins())
        });
        let first = cell.step(Word::pin).unwrap().pins();
        let [second, third] = others.map(|other| other.join().unwrap());
        seen_by_model.lock().unwrap().insert([first, second, third]);
    });
    assert_eq!(seen.lock().unwrap().len(), 6);
}
