//! Hand-outs whose subscriber breaks, or goes with more than it was given: nothing stays locked, shown or in a
//! device's reach.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use gmem::addr::{ByteSize, Pgoff};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, Export, FolioPool, GuestMemfd, HandOutRun, HostView, PartSpec, Subscriber,
    Visibility, Zone,
};

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}


/// What a subscriber that maps addresses or hands memory on has of its own.
#[derive(Debug)]
struct Owner {
    _view: HostView,
    _export: Mutex<Option<Export>>,
}

impl Subscriber for Owner {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        let _ = ack.let_go();
    }

    fn grant(&self, _: &[HandOutRun]) {}
}

#[test]
fn a_subscriber_may_own_views_and_exports_of_the_object() {
    let part = PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(4));
    let pool = FolioPool::builder().part(part, Zone::Normal).dedicated().create().unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    let peer = memfd.register_owner("peer").unwrap();
    let export = memfd.export(range(0, 4), peer).unwrap();
    let owner = Owner { _view: memfd.map_view().unwrap(), _export: Mutex::new(Some(export)) };
    let it = memfd.subscribe(Arc::new(owner)).unwrap();
    let (ended, ends) = channel();
    thread::spawn(move || {
        drop(it);
        ended.send(()).unwrap();
    });
    ends.recv_timeout(Duration::from_secs(20)).expect("the drop does not end");
    assert_eq!(memfd.stat().mapped, ByteSize::default());
    assert_eq!(memfd.stat().pinned, ByteSize::default());
}
