//! A machine is torn down while others work on the memory that it had.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use gmem::addr::{ByteSize, Gfn, Pgoff};
use gmem::hyp::Hypervisor;
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, SubscribeOptions,
    Subscriber, Visibility, audit,
};

type Outcome = Result<(), Box<dyn Error>>;

const NR_OBJECTS: u64 = 8;
const NR_PAGES: u64 = 16;
/// The mistake that this is about stopped all of them within twenty.
const NR_TEARDOWNS: usize = 300;

fn first_of(nth: u64) -> Gfn {
    Gfn::new(0x100 + NR_PAGES * nth)
}

fn tear_down_once(pool: &FolioPool, hypervisor: &Hypervisor) -> Outcome {
    let create = |_| GuestMemfd::builder(ByteSize::from_pages(NR_PAGES)).create(pool);
    let objects = (0..NR_OBJECTS).map(create).collect::<Result<Vec<_>, _>>()?;
    let vm = hypervisor.create_vm()?;
    for (nth, memfd) in (0..).zip(&objects) {
        vm.bind(first_of(nth), memfd, memfd.pages())?;
    }
    let mut vcpu = vm.create_vcpu()?;
    (0..NR_OBJECTS).try_for_each(|nth| vcpu.store(first_of(nth).ipa(), &[1]))?;
    drop(vcpu);
    let has_ended = AtomicBool::new(false);
    let page = PgoffRange::single(Pgoff::new(0))?;
    std::thread::scope(|scope| {
        for memfd in [&objects[7], &objects[6]] {
            let has_ended = &has_ended;
            scope.spawn(move || {
                // Refused as long as the page is the guest's. Relaxed: pairs with nothing, it is to be seen some time.
                while !has_ended.load(Ordering::Relaxed) {
                    let _ = memfd.punch_hole(page);
                    let _ = memfd.convert(page, Visibility::Shared, ContentPolicy::Preserve);
                    let _ = memfd.convert(page, Visibility::Private, ContentPolicy::Preserve);
                }
            });
        }
        let ended = vm.teardown();
        has_ended.store(true, Ordering::Relaxed);
        ended
    })?;
    let objects: Vec<_> = objects.iter().collect();
    assert_eq!(audit::check_under(pool, &objects, hypervisor).to_string(), "clean");
    Ok(())
}

/// The machine's lock is not held while objects are told that it is gone: they have their own, which come first.
#[test]
fn a_teardown_waits_for_nobody_who_waits_for_it() {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || {
        let outcome = || -> Outcome {
            let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(8))?;
            let hypervisor = Hypervisor::new(&pool)?;
            (0..NR_TEARDOWNS).try_for_each(|_| tear_down_once(&pool, &hypervisor))
        };
        done.send(outcome().map_err(|error| error.to_string()))
    });
    let outcome = wait.recv_timeout(Duration::from_secs(120));
    assert_eq!(outcome.expect("nobody stands still"), Ok(()));
}

/// Something has come to pass.
#[derive(Debug, Default)]
struct Event {
    has_come: Mutex<bool>,
    comes: Condvar,
}

impl Event {
    fn set(&self) {
        *self.has_come.lock().unwrap() = true;
        self.comes.notify_all();
    }

    fn wait(&self) {
        let mut has_come = self.has_come.lock().unwrap();
        while !*has_come {
            has_come = self.comes.wait(has_come).unwrap();
        }
    }
}

/// Says when its object asks it for pages, with the object locked, and answers when something else has come to pass.
#[derive(Debug)]
struct Meets {
    is_asked: Arc<Event>,
    answers_after: Arc<Event>,
}

impl Subscriber for Meets {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        self.is_asked.set();
        self.answers_after.wait();
        let _ = ack.let_go();
    }

    fn grant(&self, _: &[HandOutRun]) {}
}

/// The same moment each time: a punch has locked the one object, and a teardown, which is to tell that one next, is telling
/// the other. The punch then asks the machine.
fn tear_down_in_a_punch() -> Outcome {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(1))?;
    let hypervisor = Hypervisor::new(&pool)?;
    let create = |_| GuestMemfd::builder(ByteSize::from_pages(NR_PAGES)).create(&pool);
    let objects = (0..2).map(create).collect::<Result<Vec<_>, _>>()?;
    let vm = hypervisor.create_vm()?;
    for (nth, memfd) in (0..).zip(&objects) {
        vm.bind(first_of(nth), memfd, memfd.pages())?;
    }
    let mut vcpu = vm.create_vcpu()?;
    (0..2).try_for_each(|nth| vcpu.store(first_of(nth).ipa(), &[1]))?;
    drop(vcpu);
    let (told, punched) = (Arc::new(Event::default()), Arc::new(Event::default()));
    let private = || SubscribeOptions::default().side(Visibility::Private);
    let meets = |is_asked: &Arc<Event>, answers_after: &Arc<Event>| {
        Arc::new(Meets { is_asked: Arc::clone(is_asked), answers_after: Arc::clone(answers_after) })
    };
    let _first = objects[0].subscribe_with(meets(&told, &punched), private())?;
    let _second = objects[1].subscribe_with(meets(&punched, &told), private())?;
    let page = PgoffRange::single(Pgoff::new(0))?;
    let (torn_down, done) = std::thread::scope(|scope| {
        let punch = scope.spawn(|| objects[1].punch_hole(page));
        punched.wait();
        (vm.teardown(), punch.join().unwrap())
    });
    torn_down?;
    assert_eq!(done?.returned(), ByteSize::from_pages(1));
    Ok(())
}

#[test]
fn a_teardown_that_meets_a_punch_lets_it_ask() {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || {
        done.send(tear_down_in_a_punch().map_err(|error| error.to_string()))
    });
    let outcome = wait.recv_timeout(Duration::from_secs(60));
    assert_eq!(outcome.expect("nobody stands still"), Ok(()));
}
