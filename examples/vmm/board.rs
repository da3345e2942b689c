//! The board: what is at the addresses that are no memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use gmem::GuestMemfd;
use gmem::hyp::ConversionRequest;

use crate::Fallible;
use crate::console::Console;
use crate::guest::word;
use crate::layout::{self, REPORT, board, report, virtio};
use crate::outcome::GuestReport;
use crate::run::{Run, lock};
use crate::transport::Transport;

/// The longest line that the guest may print; it is cut there.
const MOST_PER_LINE: usize = 160;

/// Everything a vCPU's exits lead to.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) memfd: GuestMemfd,
    pub(crate) transport: Arc<Transport>,
    pub(crate) console: Arc<Console>,
    pub(crate) run: Arc<Run>,
    line: Mutex<String>,
    report: Mutex<Option<GuestReport>>,
    conversions: AtomicU64,
}

impl Board {
    pub(crate) fn new(
        memfd: GuestMemfd,
        transport: Arc<Transport>,
        console: Arc<Console>,
        run: Arc<Run>,
    ) -> Self {
        Self {
            memfd,
            transport,
            console,
            run,
            line: Mutex::default(),
            report: Mutex::default(),
            conversions: AtomicU64::new(0),
        }
    }

    /// A load of a register. Where there is none, the bus floats high.
    pub(crate) fn read(&self, ipa: u64) -> u32 {
        match ipa {
            virtio::BASE..virtio::END => self.transport.read(register(ipa)),
            board::WAIT => self.transport.wait_for_interrupt(),
            board::BASE..board::END => 0,
            _ => u32::MAX,
        }
    }

    /// A store to a register. Where there is none, nothing happens.
    pub(crate) fn write(&self, ipa: u64, value: u32) -> Fallible<()> {
        match ipa {
            virtio::BASE..virtio::END => self.transport.write(register(ipa), value),
            board::CONSOLE => self.print(value),
            board::REPORT_READY => *lock(&self.report) = Some(self.read_report()?),
            _ => {}
        }
        Ok(())
    }

    /// The guest wants memory to change sides.
    pub(crate) fn convert(&self, request: &ConversionRequest) -> bool {
        let outcome = request.convert();
        match &outcome {
            Ok(_) => _ = self.conversions.fetch_add(1, Ordering::Relaxed),
            Err(error) => self.console.say("vmm", &format!("refused the guest: {error}")),
        }
        outcome.is_ok()
    }

    /// How many conversions were done for the guest.
    pub(crate) fn conversions(&self) -> u64 {
        self.conversions.load(Ordering::Relaxed)
    }

    /// What the guest reported, if it did.
    pub(crate) fn report(&self) -> Option<GuestReport> {
        *lock(&self.report)
    }

    fn print(&self, value: u32) {
        let mut line = lock(&self.line);
        match char::from_u32(value).filter(char::is_ascii) {
            Some('\n') => self.console.say("guest", &std::mem::take(&mut *line)),
            Some(c) if !c.is_ascii_control() && line.len() < MOST_PER_LINE => line.push(c),
            _ => {}
        }
    }

    fn read_report(&self) -> Fallible<GuestReport> {
        let at = layout::offset_of(REPORT).ok_or("the report page is no memory")?;
        let mut raw = [0; report::BYTES];
        self.memfd.read(at, &mut raw)?;
        if word(&raw, report::AT_MAGIC) != report::MAGIC {
            return Err("the guest's report is none".into());
        }
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(&raw[report::AT_DIGEST..][..32]);
        Ok(GuestReport { disk_bytes: word(&raw, report::AT_DISK_BYTES), sha256 })
    }
}

/// Where in the disk's block a register is; the block is small.
fn register(ipa: u64) -> u32 {
    u32::try_from(ipa - virtio::BASE).unwrap_or(u32::MAX)
}
