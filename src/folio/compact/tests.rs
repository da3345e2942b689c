use std::sync::{Mutex, Weak};

use super::*;
use crate::backing::ArenaBacking;
use crate::folio::owner::{Placement, PrivatePlacement, Side};
use crate::folio::reservation::{Commitment, Reservation, Wanted};

/// Answers that its folio is elsewhere, which is true by then: it has just given it back.
#[derive(Debug)]
struct Late(Mutex<Option<Reservation>>);

impl Mover for Late {
    fn move_away(&self, _: Pgoff, from: Pfn) -> Result<Moved, Error> {
        if let Some(reservation) = self.0.lock().unwrap().as_ref() {
            reservation.give_back(from, FolioSize::Base);
        }
        Ok(Moved::No)
    }

    fn fence(&self, _: Pgoff, _: PfnRange) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn what_had_gone_by_itself_is_not_counted_as_moved() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2)).unwrap();
    let wanted = Wanted {
        blocks: crate::folio::ledger::Blocks { giant: 0, huge: 0, base: 1 },
        zones: &[Zone::Normal],
        private: PrivatePlacement::default(),
        placement: Placement::default(),
        commitment: Commitment::Overcommitted,
        account: None,
    };
    let reservation = pool.reserve(wanted).unwrap();
    let late = Arc::new(Late(Mutex::new(None)));
    let mover: Weak<dyn Mover> = Arc::downgrade(&(Arc::clone(&late) as Arc<dyn Mover>));
    reservation.set_mover(mover);
    reservation.take(FolioSize::Base, Pgoff::new(0), Side::Any).unwrap();
    *late.0.lock().unwrap() = Some(reservation);
    let compaction = pool.compact(FolioSize::Huge2M, Zone::Normal).unwrap();
    assert_eq!(compaction.made, PfnRange::new(Pfn::new(0), 512).ok());
    assert_eq!(compaction.moved, ByteSize::default());
}
