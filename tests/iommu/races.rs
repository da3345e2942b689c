//! Devices that go on at random addresses while pages change sides, are punched and move: no secret is read,
//! no private page and no free frame written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use gmem::addr::{ByteSize, Ipa};
use gmem::audit;
use gmem::hyp::iommu::{Device, DmaFault, DmaFaultKind, Domain, Places};
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, SubscribeOptions,
    Subscriber, Subscription, Visibility, Zone,
};

use super::{BOTH, at, mapped, object, on_side, pool, range};

const ZERO: ContentPolicy = ContentPolicy::Zero;
/// What the guest has in its private pages.
const SECRET: u8 = 0x5e;
/// What devices write.
const DEVICE: u8 = 0xdd;
const PAGE: usize = 4096;

/// One in which no folio ever moves.
fn still_pool() -> FolioPool {
    FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(8)).unwrap()
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    /// Mostly one around the border of the two folios, where all meet.
    fn page(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(2 * 512),
            _ => 500 + self.below(24),
        }
    }
}

/// A domain in another process: what it is told is carried out in order, some time later.
#[derive(Debug)]
struct Remote {
    calls: Mutex<Sender<Call>>,
    domain: Domain,
}

#[derive(Debug)]
enum Call {
    Revoke(Vec<HandOutRun>, Ack),
    Grant(Vec<HandOutRun>),
}

impl Remote {
    fn new(domain: Domain) -> (Arc<Self>, Receiver<Call>) {
        let (sender, receiver) = channel();
        (Arc::new(Self { calls: Mutex::new(sender), domain }), receiver)
    }

    fn send(&self, call: Call) {
        // If nobody listens any more the answer is lost, and the library is told so.
        let _ = self.calls.lock().unwrap_or_else(PoisonError::into_inner).send(call);
    }

    fn serve(&self, calls: Receiver<Call>) {
        let mut random = Random(0xabc);
        for call in calls {
            if random.below(8) == 0 {
                thread::sleep(Duration::from_micros(random.below(300)));
            }
            match call {
                Call::Revoke(runs, ack) => self.domain.revoke(&runs, ack),
                Call::Grant(runs) => self.domain.grant(&runs),
            }
        }
    }
}

impl Subscriber for Remote {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        self.send(Call::Revoke(runs.to_vec(), ack));
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.send(Call::Grant(runs.to_vec()));
    }
}

/// Whether folios move. In canaries they do not: what a device should have forgotten is to be another's.
#[derive(Clone, Copy, PartialEq)]
enum Moves {
    Some,
    None,
}

/// Pages change sides, go, come and move, and devices go on all the while.
struct World {
    memfd: GuestMemfd,
    /// What the guest's own device reaches: what is private.
    guest: Domain,
    _of_guest: Subscription,
    /// One at a time turns pages private.
    turn: Mutex<()>,
    moves: Moves,
    until: Instant,
    wrong: Mutex<Vec<String>>,
    /// Transfers that went through, transfers that faulted, pages turned private, punched, moved.
    done: [AtomicU64; 5],
}

impl World {
    fn new(pool: &FolioPool, time: Duration, moves: Moves) -> Self {
        let zones: &[Zone] = match moves {
            Moves::Some => &BOTH,
            Moves::None => &[Zone::Normal],
        };
        let memfd = object(pool, zones);
        let guest = Domain::new(pool, Places::Object).unwrap();
        let private = SubscribeOptions::default().side(Visibility::Private);
        let of_guest = memfd.subscribe_with(Arc::new(guest.clone()), private).unwrap();
        Self {
            memfd,
            guest,
            _of_guest: of_guest,
            turn: Mutex::default(),
            moves,
            until: Instant::now() + time,
            wrong: Mutex::default(),
            done: Default::default(),
        }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.until || !self.wrong.lock().unwrap().is_empty()
    }

    fn count(&self, what: usize) {
        self.done[what].fetch_add(1, Ordering::Relaxed);
    }

    fn complain(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    /// A driver that is anything but careful.
    fn transfers(&self, device: &Device, seed: u64) {
        let mut random = Random(seed);
        let mut buf = [0; PAGE + PAGE / 2];
        while !self.is_over() {
            let begin = random.page() * PAGE as u64 + random.below(PAGE as u64);
            let len = 1 + random.below(buf.len() as u64) as usize;
            let outcome = match random.below(2) {
                0 => device.write(Ipa::new(begin), &vec![DEVICE; len]),
                _ => {
                    buf.fill(0);
                    let outcome = device.read(Ipa::new(begin), &mut buf[..len]);
                    if buf.contains(&SECRET) {
                        self.complain(format!("a device has read a secret at {begin:#x}"));
                    }
                    outcome
                }
            };
            self.count(usize::from(outcome.is_err()));
        }
    }

    /// The guest has some pages for a while: a device that it trusts fills them with its secret, and finds
    /// them so.
    fn has_secrets(&self, seed: u64) {
        let mut random = Random(seed);
        let guest = self.guest.attach_device();
        while !self.is_over() {
            let start = random.page();
            let pages = match random.below(40) {
                0 => range(start / 512 * 512, 512),
                _ => range(start, 1 + random.below(4)),
            };
            let turn = self.turn.lock().unwrap();
            let mut sides = self.memfd.visibility(pages).unwrap();
            // What is private already is another's.
            if sides.any(|(_, side)| side == Visibility::Private)
                || self.memfd.allocate(pages).is_err()
                || self.memfd.convert(pages, Visibility::Private, ZERO).is_err()
            {
                continue;
            }
            drop(turn);
            self.count(2);
            for page in pages.iter() {
                self.patiently(|| guest.write(at(page.get()), &[SECRET; PAGE]));
            }
            self.let_devices_try();
            let mut buf = [0; PAGE];
            for page in pages.iter() {
                self.patiently(|| guest.read(at(page.get()), &mut buf));
                if let Some(byte) = buf.iter().find(|&&byte| byte != SECRET) {
                    self.complain(format!("{byte:#x} is in the private page {page}"));
                }
            }
            // Somebody may be moving them.
            while self.memfd.convert(pages, Visibility::Shared, ZERO).is_err() {
                thread::yield_now();
            }
        }
    }

    /// Until there have been some transfers more.
    fn let_devices_try(&self) {
        let nr_tried =
            || self.done[0].load(Ordering::Relaxed) + self.done[1].load(Ordering::Relaxed);
        let enough = nr_tried() + 30;
        while nr_tried() < enough && !self.is_over() {
            thread::sleep(Duration::from_micros(50));
        }
    }

    /// A page that is being moved is out of reach for a moment.
    fn patiently(&self, mut transfer: impl FnMut() -> Result<(), DmaFault>) {
        let begin = Instant::now();
        while let Err(fault) = transfer() {
            assert_eq!(fault.kind, DmaFaultKind::NotMapped);
            assert!(begin.elapsed() < Duration::from_secs(20), "{fault}");
            thread::yield_now();
        }
    }

    fn punches_and_moves(&self) {
        let mut random = Random(0x9a);
        while !self.is_over() {
            let pages = range(random.page(), 1 + random.below(8));
            // Nobody's secret: a punch would wipe it out.
            let turn = self.turn.lock().unwrap();
            let shared =
                self.memfd.visibility(pages).unwrap().all(|(_, side)| side == Visibility::Shared);
            if shared && self.memfd.punch_hole(pages).is_ok() {
                self.count(3);
            }
            drop(turn);
            thread::sleep(Duration::from_micros(200));
            let _ = self.memfd.allocate(pages);
            if self.moves == Moves::None || random.below(3) > 0 {
                continue;
            }
            let to = [Zone::Normal, Zone::Movable][random.below(2) as usize];
            if let Ok(moved) = self.memfd.migrate(pages, to) {
                if moved.moved > ByteSize::default() {
                    self.count(4);
                }
            }
        }
    }

    fn run(&self, domain: &Domain) {
        thread::scope(|scope| {
            let devices = [domain.attach_device(), domain.attach_device()];
            for (nr, device) in devices.into_iter().enumerate() {
                scope.spawn(move || self.transfers(&device, 0x1000 + nr as u64));
            }
            for seed in [0x51, 0x52] {
                scope.spawn(move || self.has_secrets(seed));
            }
            scope.spawn(|| self.punches_and_moves());
        });
        // What was punched or left behind is nobody's any more.
        if let Err(unscrubbed) = self.memfd.pool().verify_scrubbed() {
            self.complain(format!("a device has written to free memory: {unscrubbed}"));
        }
    }
}

fn seconds() -> Duration {
    let seconds = std::env::var("GMEM_STRESS_SECONDS").map_or(2, |it| it.parse().unwrap());
    Duration::from_secs(seconds)
}

#[test]
fn no_dma_ever_reaches_a_private_page() {
    let pool = pool();
    let world = World::new(&pool, seconds(), Moves::Some);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let _it = world.memfd.subscribe(Arc::new(domain.clone())).unwrap();
    world.run(&domain);
    println!("transfers, faults, to private, punches, moves: {:?}", world.done);
    assert_eq!(*world.wrong.lock().unwrap(), [] as [String; 0]);
    assert!(world.done.iter().all(|done| done.load(Ordering::Relaxed) > 0), "{:?}", world.done);
    assert_eq!(mapped(&domain), on_side(&world.memfd, Visibility::Shared));
    assert_eq!(audit::check(&pool, &[&world.memfd]).to_string(), "clean");
}

#[test]
fn no_dma_reaches_a_private_page_where_the_domain_is_in_another_process() {
    let pool = pool();
    let world = World::new(&pool, seconds(), Moves::Some);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let (remote, calls) = Remote::new(domain.clone());
    let terms = SubscribeOptions::default().answer_within(Duration::from_secs(30));
    thread::scope(|scope| {
        let server = Arc::clone(&remote);
        scope.spawn(move || server.serve(calls));
        let it = world.memfd.subscribe_with(Arc::clone(&remote) as _, terms).unwrap();
        world.run(&domain);
        drop(it);
        // Hangs up.
        *remote.calls.lock().unwrap() = channel().0;
    });
    println!("transfers, faults, to private, punches, moves: {:?}", world.done);
    assert_eq!(*world.wrong.lock().unwrap(), [] as [String; 0]);
    assert!(world.done.iter().all(|done| done.load(Ordering::Relaxed) > 0), "{:?}", world.done);
    assert_eq!(domain.leaves(), []);
}

/// The same test notices an IOMMU that revokes without invalidating what devices remember.
#[test]
fn canary_forgotten_iotlbs_are_noticed() {
    let pool = still_pool();
    let world = World::new(&pool, Duration::from_secs(60), Moves::None);
    let domain = Domain::forgetting_iotlbs(&pool, Places::Object).unwrap();
    let _it = world.memfd.subscribe(Arc::new(domain.clone())).unwrap();
    world.run(&domain);
    let wrong = world.wrong.lock().unwrap();
    println!("{wrong:?} {:?}", world.done);
    assert!(!wrong.is_empty(), "a device that remembers too much went unnoticed");
}

/// And one that says it has let go, and has not.
#[test]
fn canary_empty_answers_are_noticed() {
    #[derive(Debug)]
    struct Hasty(Domain);

    impl Subscriber for Hasty {
        fn revoke(&self, _: &[HandOutRun], ack: Ack) {
            let _ = ack.let_go();
        }

        fn grant(&self, runs: &[HandOutRun]) {
            self.0.grant(runs);
        }
    }

    let pool = still_pool();
    let world = World::new(&pool, Duration::from_secs(60), Moves::None);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let _it = world.memfd.subscribe(Arc::new(Hasty(domain.clone()))).unwrap();
    world.run(&domain);
    let wrong = world.wrong.lock().unwrap();
    println!("{wrong:?} {:?}", world.done);
    assert!(!wrong.is_empty(), "an answer that is not true went unnoticed");
}
