//! Steps are done.

use std::collections::BTreeMap;

use pkvm_oracle::{Errno as Number, Name, Observation, Place as Named, Signal};

use super::parcel::{Message, What};
use super::seen::{Heard, Holder, Seen};
use super::step::{HostAct, Life, Step, Who};
use crate::addr::{Gfn, Ipa};
use crate::error::Errno;
use crate::geometry::PAGE_SIZE;
use crate::hyp::gunyah::host::process::{
    Bind, Kind, MemoryId, Place, Process, Ran, Span, Touched, VmId,
};
use crate::hyp::gunyah::hostile::wire::encode;
use crate::hyp::gunyah::memdb::Owner;
use crate::hyp::gunyah::rm::Vmid;
use crate::hyp::gunyah::rm::message::{
    ACCEPTED, Accept, AclEntry, Create, RECALL, RELEASED, Request, SHARED, SglEntry,
};
use crate::hyp::gunyah::touch::Bytes;

pub(super) struct Machine {
    process: Process,
    memories: BTreeMap<Name, MemoryId>,
    vms: BTreeMap<Name, VmId>,
    parcels: BTreeMap<Name, u32>,
    /// The kernel is.
    is_dead: bool,
}

/// What a name is for is not there.
struct Absent;

type Did = Result<Seen, Absent>;

fn failed(errno: Errno) -> Seen {
    Seen::Plain(Observation::Failed(number(errno)))
}

fn number(errno: Errno) -> Number {
    Number(errno.get())
}

fn shown(answer: Result<(), Errno>) -> Seen {
    answer.map_or_else(failed, |()| Seen::OK)
}

fn find<T: Copy>(names: &BTreeMap<Name, T>, name: &Name) -> Result<T, Absent> {
    names.get(name).copied().ok_or(Absent)
}

fn name_it<T>(names: &mut BTreeMap<Name, T>, name: &Name, of: T) {
    names.insert(name.clone(), of);
}

impl Machine {
    pub(super) fn boot() -> Self {
        Self {
            process: Process::boot(),
            memories: BTreeMap::new(),
            vms: BTreeMap::new(),
            parcels: BTreeMap::new(),
            is_dead: false,
        }
    }

    pub(super) fn check(&self) -> Vec<String> {
        self.process.check()
    }

    pub(super) fn step(&mut self, step: &Step) -> Seen {
        if self.is_dead {
            return Seen::NOTHING;
        }
        self.act(step).unwrap_or(Seen::NOTHING)
    }

    fn act(&mut self, step: &Step) -> Did {
        let process = &mut self.process;
        match step {
            Step::Memory { name, gmem, nr_pages, huge } => {
                let kind = if *gmem { Kind::GuestMemfd { huge: *huge } } else { Kind::Plain };
                let made = process.memory(kind, *nr_pages);
                Ok(shown(made.map(|id| name_it(&mut self.memories, name, id))))
            }
            Step::MapPrivate(name) => Ok(shown(process.map_private(find(&self.memories, name)?))),
            Step::Vm(name) => Ok(shown(process.vm().map(|id| name_it(&mut self.vms, name, id)))),
            Step::Bind { vm, at, pages, side, writes } => {
                let memory = find(&self.memories, &pages.memory)?;
                let what = Bind { memory, first: pages.first, side: *side, writes: *writes };
                let at = Span { gfn: *at, nr: pages.end - pages.first };
                Ok(shown(process.bind(find(&self.vms, vm)?, at, what)))
            }
            Step::Unbind(vm, at) => Ok(shown(process.unbind(find(&self.vms, vm)?, *at))),
            Step::Guest(vm, at, store) => {
                let vm = find(&self.vms, vm)?;
                let mut byte = 0;
                let load = store.is_none().then_some(&mut byte);
                let ran = process.run(vm, Ipa::new(*at), load, store.unwrap_or_default());
                Ok(match (ran, store) {
                    (Ran::Done, None) => Seen::Plain(Observation::Byte(byte)),
                    (Ran::Done, Some(_)) => Seen::OK,
                    (Ran::PageFault(errno), _) => Seen::Plain(Observation::Run(number(errno))),
                    (Ran::NotRunning, _) => Seen::Plain(Observation::Idle),
                    (Ran::Spins, _) => Seen::Plain(Observation::Spins),
                })
            }
            Step::Host(act, place) => self.host(*act, place),
            Step::Provide(vm, gfn) => Ok(shown(process.demand(find(&self.vms, vm)?, *gfn, false))),
            Step::Reclaim(vm, at) => Ok(shown(process.reclaim(find(&self.vms, vm)?, *at))),
            Step::Turn(vm, at, to) => Ok(shown(process.turn(find(&self.vms, vm)?, *at, *to))),
            Step::Life(vm, life) => {
                let guest = process.guest(find(&self.vms, vm)?);
                Ok(shown(match life {
                    Life::Pause => guest.pause(true),
                    Life::Resume => guest.pause(false),
                    Life::Stop => guest.stop(),
                    Life::Reset => guest.reset(),
                    Life::Close => guest.teardown(),
                }))
            }
            Step::State(vm) => {
                let state = process.guest(find(&self.vms, vm)?).state();
                Ok(state.map_or(Seen::NoVm, Seen::State))
            }
            Step::Holder(place) => self.holder(place),
            Step::Message(who, message) => self.message(who, message),
            Step::Hear(who) => {
                let vmid = self.vmid(who)?;
                let heard = self.process.gunyah.hear(vmid).ok_or(Absent)?;
                Ok(Seen::Hears(match heard.id {
                    SHARED => Heard::Shared,
                    RELEASED => Heard::Released,
                    ACCEPTED => Heard::Accepted,
                    RECALL => Heard::Recall,
                    other => panic!("nobody says {other:#x}"),
                }))
            }
        }
    }

    fn place(&self, place: &Named) -> Result<Place, Absent> {
        let memory = find(&self.memories, &place.memory)?;
        Ok(Place { memory, page: place.page, offset: place.offset })
    }

    fn host(&mut self, act: HostAct, place: &Named) -> Did {
        let place = self.place(place)?;
        let process = &mut self.process;
        let mut byte = [0];
        let touched = match act {
            HostAct::Load(by) => process.touch(by, place, Bytes::Load(&mut byte)),
            HostAct::Store(by, byte) => process.touch(by, place, Bytes::Store(&[byte])),
            HostAct::Pin => process.pin(place, true),
            HostAct::Unpin => process.pin(place, false),
            HostAct::Discard => {
                process.discard(place);
                Touched::Done
            }
            HostAct::Punch => return Ok(shown(process.punch(place))),
        };
        self.is_dead = touched == Touched::Dead;
        Ok(match touched {
            Touched::Done if matches!(act, HostAct::Load(_)) => {
                Seen::Plain(Observation::Byte(byte[0]))
            }
            Touched::Done => Seen::OK,
            Touched::Sigbus(code) => Seen::Plain(Observation::Signal(Signal::Bus, code)),
            Touched::Efault => failed(Errno::EFAULT),
            Touched::Dead => Seen::Dies,
        })
    }

    fn holder(&mut self, place: &Named) -> Did {
        let Place { memory, page, .. } = self.place(place)?;
        let frames = self.process.frames(memory, page, page + 1);
        let &pfn = frames.first().ok_or(Absent)?;
        self.process.gunyah.with(|world| {
            let Owner::Extent(id) = world.hyp.memdb.owner(pfn) else { return Err(Absent) };
            let vms = &world.rm.vms;
            let has =
                |is: fn(super::super::rm::paging::Paging) -> super::super::memdb::ExtentId| {
                    vms.values().filter_map(|vm| vm.paging).any(|paging| is(paging) == id)
                };
            let is_home = |vmid| vms.get(&vmid).and_then(|vm| vm.home).map(|home| home.memory);
            Ok(Seen::Holder(match () {
                () if is_home(Vmid::HLOS) == Some(id) => Holder::Host,
                () if has(|paging| paging.private) => Holder::Lent,
                () if has(|paging| paging.shared) => Holder::Shared,
                () if world.rm.parcels.values().any(|parcel| parcel.extent == id) => Holder::Parcel,
                () if vms.keys().any(|&vmid| is_home(vmid) == Some(id)) => Holder::Vm,
                () => Holder::Lost,
            }))
        })
    }

    fn vmid(&self, who: &Who) -> Result<Vmid, Absent> {
        match who {
            Who::Host => Ok(Vmid::HLOS),
            Who::Vm(name) => self.process.vmid(find(&self.vms, name)?).ok_or(Absent),
        }
    }

    fn acl(&self, members: &[(Who, u8)]) -> Result<Vec<AclEntry>, Absent> {
        let entry =
            |(who, rights): &(Who, u8)| Ok(AclEntry { vmid: self.vmid(who)?, rights: *rights });
        members.iter().map(entry).collect()
    }

    /// Memory by its owner's addresses. Frames that follow each other are one piece.
    fn sgl(&mut self, what: &What) -> Result<Vec<SglEntry>, Absent> {
        let pages = match what {
            What::Nothing => return Ok(Vec::new()),
            What::Span(span) => return Ok(vec![entry(*span)]),
            What::Pages(pages) => pages,
        };
        let memory = find(&self.memories, &pages.memory)?;
        let mut spans: Vec<Span> = Vec::new();
        for pfn in self.process.frames(memory, pages.first, pages.end) {
            match spans.last_mut() {
                Some(last) if last.gfn.get() + last.nr == pfn.get() => last.nr += 1,
                _ => spans.push(Span { gfn: Gfn::new(pfn.get()), nr: 1 }),
            }
        }
        Ok(spans.into_iter().map(entry).collect())
    }

    fn message(&mut self, who: &Who, message: &Message) -> Did {
        let from = self.vmid(who)?;
        let request = match message {
            Message::Raw(id, body) => {
                let reply = self.process.gunyah.message(from, *id, body);
                return Ok(reply.error.map_or(Seen::OK, Seen::Refused));
            }
            Message::Create { transfer, what, members, flags, mem_type, label, .. } => {
                Request::Create(Create {
                    transfer: *transfer,
                    mem_type: *mem_type,
                    flags: *flags,
                    label: *label,
                    acl: self.acl(members)?,
                    sgl: self.sgl(what)?,
                    attrs: Vec::new(),
                })
            }
            Message::Append { parcel, what, flags } => {
                let handle = find(&self.parcels, parcel)?;
                Request::Append { handle, flags: *flags, sgl: self.sgl(what)? }
            }
            Message::Accept {
                parcel,
                transfer,
                places,
                members,
                map_for,
                flags,
                mem_type,
                label,
            } => Request::Accept(Accept {
                handle: find(&self.parcels, parcel)?,
                mem_type: *mem_type,
                transfer: *transfer as u8,
                flags: *flags,
                label: *label,
                acl: self.acl(members)?,
                sgl: places.iter().copied().map(entry).collect(),
                map_vmid: map_for.as_ref().map_or(Ok(Vmid(0)), |who| self.vmid(who))?,
                attrs: Vec::new(),
            }),
            Message::Release { parcel, flags } => {
                Request::Release { handle: find(&self.parcels, parcel)?, flags: *flags }
            }
            Message::Reclaim { parcel, flags } => {
                Request::Reclaim { handle: find(&self.parcels, parcel)?, flags: *flags }
            }
            Message::Notify { parcel, flags, to } => {
                let handle = find(&self.parcels, parcel)?;
                let mut list = Vec::new();
                if !to.is_empty() {
                    list.extend(u16::try_from(to.len()).map_err(|_| Absent)?.to_le_bytes());
                    list.extend([0, 0]);
                }
                for who in to {
                    list.extend(self.vmid(who)?.0.to_le_bytes());
                    list.extend([0, 0]);
                }
                Request::Notify { handle, flags: *flags, tag: 0, list }
            }
        };
        let (id, body) = encode(&request);
        let reply = self.process.gunyah.message(from, id, &body);
        if let Some(error) = reply.error {
            return Ok(Seen::Refused(error));
        }
        match message {
            Message::Create { parcel, .. } => {
                let handle = reply.body.as_slice().try_into().map_err(|_| Absent)?;
                self.parcels.insert(parcel.clone(), u32::from_le_bytes(handle));
                Ok(Seen::OK)
            }
            // Where it was put, if that was left open: behind a count of pieces.
            Message::Accept { .. } => Ok(match reply.body.get(4..12) {
                Some(at) => Seen::At(u64::from_le_bytes(at.try_into().map_err(|_| Absent)?)),
                None => Seen::OK,
            }),
            _ => Ok(Seen::OK),
        }
    }
}

fn entry(span: Span) -> SglEntry {
    SglEntry { ipa: span.gfn.ipa().get(), size: span.nr * PAGE_SIZE.get() }
}
