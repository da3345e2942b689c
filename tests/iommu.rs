//! The simulated IOMMU: what its domain maps, and that no DMA ever reaches a page that is private to the
//! guest while pages change sides, go and move under it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use gmem::addr::{Access, ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::Errno;
use gmem::hyp::iommu::{Device, DmaFault, DmaFaultKind, Domain, DomainState, Places};
use gmem::hyp::pkvm::Hypervisor;
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, OnSilence, PartSpec,
    Residency, Standing, SubscribeOptions, Subscriber, Subscription, Visibility, Zone,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const ZERO: ContentPolicy = ContentPolicy::Zero;
/// What the guest has in its private pages.
const SECRET: u8 = 0x5e;
/// What devices write.
const DEVICE: u8 = 0xdd;
const PAGE: usize = 4096;
/// Two folios, and a tail.
const PAGES: u64 = 2 * 512 + 8;

const BOTH: [Zone; 2] = [Zone::Movable, Zone::Normal];

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn at(page: u64) -> Ipa {
    Gfn::new(page).ipa()
}

fn pool() -> FolioPool {
    let part = || PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(8));
    FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable).create().unwrap()
}

/// One in which no folio ever moves.
fn still_pool() -> FolioPool {
    FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(8)).unwrap()
}

fn object(pool: &FolioPool, zones: &[Zone]) -> GuestMemfd {
    let memfd = GuestMemfd::builder(ByteSize::from_pages(PAGES))
        .zones(zones)
        .initial(Visibility::Shared)
        .create(pool)
        .unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    memfd
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

/// The pages that a domain maps, one by one.
fn mapped(domain: &Domain) -> Vec<u64> {
    domain.leaves().iter().flat_map(|(at, _)| at.iter().map(Gfn::get)).collect()
}

fn on_side(memfd: &GuestMemfd, side: Visibility) -> Vec<u64> {
    let infos = memfd.snapshot(memfd.pages()).unwrap();
    infos
        .filter(|(_, info)| info.visibility == side && info.residency == Residency::Resident)
        .flat_map(|(pages, _)| pages.iter().map(Pgoff::get).collect::<Vec<_>>())
        .collect()
}

#[test]
fn whole_folios_are_large_leaves_and_split_where_a_page_leaves() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(8)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(8)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let _it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    let sizes = || {
        let mut sizes: Vec<u64> = domain.leaves().iter().map(|(at, _)| at.nr_pages()).collect();
        sizes.sort();
        (
            sizes.iter().filter(|&&size| size == 1).count(),
            sizes.last().copied().unwrap(),
            sizes.len(),
        )
    };
    assert_eq!(sizes(), (0, 512, 4));
    let _ = memfd.convert(range(600, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(sizes(), (511, 512, 3 + 511));
    let _ = memfd.convert(range(512, 512), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(sizes(), (0, 512, 3));
    let _ = memfd.convert(range(512, 512), Visibility::Shared, PRESERVE).unwrap();
    assert_eq!(sizes(), (0, 512, 4), "a folio that comes back whole is one leaf");
    for (at, frames) in domain.leaves() {
        assert_eq!(at.nr_pages(), frames.nr_pages());
    }
}

#[test]
fn a_device_reaches_what_is_shared_and_faults_elsewhere() {
    let pool = pool();
    let memfd = object(&pool, &BOTH);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    let device = domain.attach_device();
    memfd.write(Offset::new(4090), b"across pages").unwrap();
    let mut seen = [0; 12];
    device.read(Ipa::new(4090), &mut seen).unwrap();
    assert_eq!(&seen, b"across pages");
    device.write(at(3), b"from the device").unwrap();
    let mut seen = [0; 15];
    memfd.read(Offset::new(3 << 12), &mut seen).unwrap();
    assert_eq!(&seen, b"from the device");

    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    memfd.punch_hole(range(5, 1)).unwrap();
    for (page, access) in [(3, Access::Read), (5, Access::Write), (PAGES, Access::Read)] {
        let fault = match access {
            Access::Write => device.write(at(page), &[1]),
            _ => device.read(at(page), &mut [0]),
        };
        let fault = fault.unwrap_err();
        assert_eq!(
            (fault.at, fault.access, fault.kind),
            (at(page), access, DmaFaultKind::NotMapped)
        );
    }
    assert_eq!((domain.nr_faults(), domain.last_faults().len()), (3, 3));
    assert!(device.read(Ipa::new(u64::MAX), &mut [0; 2]).is_err());
    // A hole is filled by the host, and handed out with that.
    memfd.write(Offset::new(5 << 12), &[7]).unwrap();
    let mut seen = [0];
    device.read(at(5), &mut seen).unwrap();
    assert_eq!(seen, [7]);
    drop(it);
    assert_eq!(domain.leaves(), []);
}

#[test]
fn a_device_follows_pages_that_move_to_other_frames() {
    let pool = pool();
    let memfd = object(&pool, &BOTH);
    let _ = memfd.migrate(memfd.pages(), Zone::Movable).unwrap();
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let _it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    let device = domain.attach_device();
    device.write(at(700), b"before").unwrap();
    let before = domain.leaves();
    let moved = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    assert!(moved.moved > ByteSize::default() && moved.refused.is_empty(), "{moved:?}");
    assert_ne!(domain.leaves(), before);
    let mut seen = [0; 6];
    device.read(at(700), &mut seen).unwrap();
    assert_eq!(&seen, b"before");
    device.write(at(700), b"behind").unwrap();
    memfd.read(Offset::new(700 << 12), &mut seen).unwrap();
    assert_eq!(&seen, b"behind");
}

#[test]
fn devices_of_a_guest_find_pages_where_it_sees_them() {
    let pool = pool();
    let memfd = GuestMemfd::builder(ByteSize::from_pages(64)).create(&pool).unwrap();
    let trusted = Domain::new(&pool, Places::Guest).unwrap();
    let host = Domain::new(&pool, Places::Guest).unwrap();
    let private = SubscribeOptions::default().side(Visibility::Private).name("tdisp");
    let _trusted = memfd.subscribe_with(Arc::new(trusted.clone()), private).unwrap();
    let _host = memfd.subscribe(Arc::new(host.clone())).unwrap();
    let vm = Hypervisor::new(&pool).unwrap().create_vm().unwrap();
    vm.bind(Gfn::new(0x80000), &memfd, memfd.pages()).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store(at(0x80003), b"to a device that I trust").unwrap();
    let mut seen = [0; 24];
    trusted.attach_device().read(at(0x80003), &mut seen).unwrap();
    assert_eq!(&seen, b"to a device that I trust");
    assert!(host.attach_device().read(at(0x80003), &mut seen).is_err());
    assert!(trusted.attach_device().read(at(3), &mut seen).is_err());
}

#[test]
fn a_domain_that_was_fenced_off_lets_nothing_through_until_it_is_attached_again() {
    let pool = pool();
    let memfd = object(&pool, &BOTH);
    let domain = Domain::new(&pool, Places::Object).unwrap();
    let mute = Arc::new(Mute(domain.clone()));
    let terms = SubscribeOptions::default().on_silence(OnSilence::FenceOff);
    let it = memfd.subscribe_with(mute, terms).unwrap();
    let device = domain.attach_device();
    device.read(at(9), &mut [0]).unwrap();
    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!((it.standing(), domain.state()), (Standing::FencedOff, DomainState::Detached));
    for page in [3, 9] {
        let fault = device.read(at(page), &mut [0]).unwrap_err();
        assert_eq!(fault.kind, DmaFaultKind::Detached);
    }
    drop(it);
    domain.reattach().unwrap();
    let _it = memfd.subscribe(Arc::new(domain.clone())).unwrap();
    device.read(at(9), &mut [0]).unwrap();
    assert_eq!(mapped(&domain), on_side(&memfd, Visibility::Shared));
}

/// A domain whose keeper never answers.
#[derive(Debug)]
struct Mute(Domain);

impl Subscriber for Mute {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        drop(ack);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.0.grant(runs);
    }

    fn fence(&self) -> Result<(), Errno> {
        self.0.fence()
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
