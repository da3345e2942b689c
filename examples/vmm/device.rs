//! The disk: virtio-blk over virtio-queue's rings and gmem's view of guest memory.
//!
//! A request is served under one guard of the address space. From the moment the device has the
//! slices of a buffer until the request is done, the guard keeps those pages pinned.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use gmem::vm_memory::{AddressSpace, GuestSlice, MemoryGuard, refusal};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryError, ReadVolatile,
    VolatileMemoryError,
};

use crate::Fallible;
use crate::console::Console;
use crate::intruder::{Attempt, Intruder};
use crate::layout::SECTOR;
use crate::run::Run;
use crate::transport::{Command, Transport};

/// The name under which the device pins memory.
pub(crate) const OWNER: &str = "virtio-blk";
// A status is one byte.
const OK: u8 = VIRTIO_BLK_S_OK.to_le_bytes()[0];
const IOERR: u8 = VIRTIO_BLK_S_IOERR.to_le_bytes()[0];
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP.to_le_bytes()[0];
/// What the disk calls itself.
const ID: &[u8] = b"gmem-demo-disk";
/// Of how many reads the intruder gets to see one.
const READS_PER_INTRUSION: u64 = 64;

/// What the device has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeviceStat {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) bad_descriptors: u64,
}

/// The disk's thread.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) memory: AddressSpace,
    pub(crate) file: File,
    pub(crate) disk_bytes: u64,
    pub(crate) transport: Arc<Transport>,
    pub(crate) intruder: Intruder,
    pub(crate) console: Arc<Console>,
    pub(crate) run: Arc<Run>,
    pub(crate) stat: DeviceStat,
}

/// A request taken apart.
struct Request {
    kind: u32,
    sector: u64,
    data: Vec<Descriptor>,
    status: GuestAddress,
}

/// Why a request was not served.
enum Refusal {
    /// A descriptor points where the device must not go.
    Memory(Descriptor, GuestMemoryError),
    /// The request itself makes no sense.
    Request(&'static str),
    /// The device does not know this kind of request.
    Unsupported(u32),
    /// The file would not be read.
    File(std::io::Error),
}

impl Device {
    /// Serves until the machine is off.
    pub(crate) fn serve(mut self, commands: &Receiver<Command>) -> Fallible<DeviceStat> {
        let mut queue = None;
        loop {
            match commands.recv_timeout(Duration::from_millis(200)) {
                Ok(Command::Start(new)) => queue = self.start(new),
                Ok(Command::Kick) => {
                    if let Some(live) = &mut queue {
                        if let Err(error) = self.drain(live) {
                            self.console.say(OWNER, &format!("the queue is broken: {error}"));
                            self.transport.needs_reset();
                            queue = None;
                        }
                    }
                }
                Ok(Command::Reset) => {
                    queue = None;
                    self.transport.reset_done();
                }
                Ok(Command::Quit) | Err(RecvTimeoutError::Disconnected) => return Ok(self.stat),
                Err(RecvTimeoutError::Timeout) => self.run.check()?,
            }
        }
    }

    fn start(&self, queue: Queue) -> Option<Queue> {
        if queue.is_valid(&*self.memory.memory()) {
            return Some(queue);
        }
        self.console.say(OWNER, "the queue does not lie in shared memory");
        self.transport.needs_reset();
        None
    }

    /// Serves what is available. An error means that the rings themselves cannot be used.
    fn drain(&mut self, queue: &mut Queue) -> Fallible<()> {
        loop {
            self.run.check()?;
            // A guard of its own for each request, so that nothing stays pinned for longer.
            let memory = self.memory.memory();
            let Some(chain) = queue.iter(memory.clone())?.next() else { return Ok(()) };
            let head = chain.head_index();
            let written = self.serve_one(&memory, chain);
            queue.add_used(&*memory, head, written)?;
            drop(memory);
            self.transport.interrupt();
            self.run.beat();
        }
    }

    /// Serves a request; returns how many bytes the device has written to guest memory.
    fn serve_one(&mut self, memory: &MemoryGuard, chain: DescriptorChain<MemoryGuard>) -> u32 {
        self.stat.requests += 1;
        let Some(request) = parse(memory, chain) else {
            self.console.say(OWNER, "a chain that is no request: ignored");
            return 0;
        };
        let (status, written) = match self.execute(memory, &request) {
            Ok(written) => (OK, written),
            Err(refusal) => (self.explain(&refusal), 0),
        };
        match memory.write_obj(status, request.status) {
            Ok(()) => written.saturating_add(1),
            Err(error) => {
                self.stat.bad_descriptors += 1;
                self.console.say(OWNER, &format!("cannot write the status: {}", reason(&error)));
                0
            }
        }
    }

    fn execute(&mut self, memory: &MemoryGuard, request: &Request) -> Result<u32, Refusal> {
        // The slices, and with them the pins, before anything else.
        let mut slices = Vec::new();
        for descriptor in &request.data {
            if !descriptor.is_write_only() {
                return Err(Refusal::Request("a buffer to read into is not writable"));
            }
            let len = descriptor.len() as usize;
            for slice in GuestMemoryBackend::get_slices(&**memory, descriptor.addr(), len) {
                slices.push(slice.map_err(|error| Refusal::Memory(*descriptor, error))?);
            }
        }
        match request.kind {
            VIRTIO_BLK_T_IN => {
                if self.stat.requests % READS_PER_INTRUSION == 2 {
                    self.intrude(request);
                }
                self.read(request, &slices)
            }
            VIRTIO_BLK_T_GET_ID => {
                self.intrude(request);
                get_id(&slices)
            }
            other => Err(Refusal::Unsupported(other)),
        }
    }

    /// Reads sectors of the file straight into guest memory.
    fn read(&mut self, request: &Request, slices: &[GuestSlice<'_>]) -> Result<u32, Refusal> {
        let len: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        let start = request.sector.checked_mul(SECTOR).ok_or(Refusal::Request("no such sector"))?;
        let end = start.checked_add(len).ok_or(Refusal::Request("no such sector"))?;
        if len % SECTOR != 0 || end > self.disk_bytes.next_multiple_of(SECTOR) {
            return Err(Refusal::Request("a read past the end of the disk"));
        }
        self.file.seek(SeekFrom::Start(start)).map_err(Refusal::File)?;
        let mut left = self.disk_bytes - start.min(self.disk_bytes);
        for slice in slices {
            let from_file = usize::try_from(left).unwrap_or(usize::MAX).min(slice.len());
            let split = slice.split_at(from_file).map_err(into_file_error)?;
            let (mut data, padding) = split;
            self.file.read_exact_volatile(&mut data).map_err(into_file_error)?;
            // The disk is a whole number of sectors, which the file need not be.
            padding.copy_from(&vec![0_u8; padding.len()]);
            left -= from_file as u64;
        }
        self.stat.bytes += len;
        self.console.bytes_done(self.stat.bytes);
        // Chains of 4 GiB and more do not get here.
        Ok(u32::try_from(len).unwrap_or(u32::MAX))
    }

    /// Lets somebody try to take away what is pinned right now, and waits for the outcome.
    fn intrude(&self, request: &Request) {
        if let Some(buffer) = request.data.first() {
            self.intruder.attempt(&self.run, Attempt::on(buffer.addr().0, buffer.len().into()));
        }
    }

    /// Says what was wrong with a request, and which status that is.
    fn explain(&mut self, refusal: &Refusal) -> u8 {
        match refusal {
            Refusal::Memory(descriptor, error) => {
                self.stat.bad_descriptors += 1;
                let (addr, len) = (descriptor.addr().0, descriptor.len());
                let why = reason(error);
                self.console.say(OWNER, &format!("refused descriptor {addr:#x}+{len:#x}: {why}"));
                IOERR
            }
            Refusal::Request(why) => {
                self.console.say(OWNER, &format!("refused a request: {why}"));
                IOERR
            }
            Refusal::Unsupported(kind) => {
                self.console.say(OWNER, &format!("requests of type {kind} are not supported"));
                UNSUPPORTED
            }
            Refusal::File(error) if error.kind() == ErrorKind::UnexpectedEof => {
                self.run.fail("FILE became shorter while it was being served");
                IOERR
            }
            Refusal::File(error) => {
                self.run.fail(format!("FILE cannot be read: {error}"));
                IOERR
            }
        }
    }
}

/// Takes a chain apart: a header to read, buffers, and a status byte to write.
fn parse(memory: &MemoryGuard, chain: DescriptorChain<MemoryGuard>) -> Option<Request> {
    let mut descriptors: Vec<Descriptor> = chain.collect();
    let status = descriptors.pop().filter(|d| d.is_write_only() && d.len() >= 1)?;
    let mut rest = descriptors.into_iter();
    let header = rest.next().filter(|d| !d.is_write_only() && d.len() >= 16)?;
    let [kind, _reserved, low, high] = memory.read_obj::<[u32; 4]>(header.addr()).ok()?;
    let sector = u64::from(u32::from_le(high)) << 32 | u64::from(u32::from_le(low));
    let kind = u32::from_le(kind);
    Some(Request { kind, sector, data: rest.collect(), status: status.addr() })
}

fn get_id(slices: &[GuestSlice<'_>]) -> Result<u32, Refusal> {
    let [buffer] = slices else { return Err(Refusal::Request("a name needs one buffer")) };
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    id[..ID.len()].copy_from_slice(ID);
    if buffer.len() < id.len() {
        return Err(Refusal::Request("the buffer is too small for a name"));
    }
    buffer.copy_from(&id);
    Ok(VIRTIO_BLK_ID_BYTES)
}

/// The library's own words, where it was the library that refused.
fn reason(error: &GuestMemoryError) -> String {
    match (refusal(error), error) {
        (Some(refusal), _) => refusal.to_string(),
        (None, GuestMemoryError::InvalidGuestAddress(addr)) => {
            format!("there is no guest memory at {:#x}", addr.0)
        }
        (None, other) => other.to_string(),
    }
}

fn into_file_error(error: VolatileMemoryError) -> Refusal {
    Refusal::File(match error {
        VolatileMemoryError::IOError(error) => error,
        other => std::io::Error::other(other),
    })
}
