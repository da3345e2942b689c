//! What a boot needs: an emulator, a kernel, the agent, an archive. And the boot.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cpio::Archive;
use super::{Cannot, Random};
use crate::Context;
use crate::shell::Cmd;
use crate::toolchains;

/// Where emulator and kernel are kept from run to run.
const CACHE: &str = "GMEM_PKVM_DIR";
const TARGET: &str = "aarch64-unknown-linux-musl";
const EMULATOR: &str = "qemu-system-aarch64";
/// Older ones show pages as not wiped that are.
const OLDEST_EMULATOR: u32 = 10;
/// A boot takes some ten seconds where nothing else runs.
const BOOT_LIMIT: Duration = Duration::from_secs(10 * 60);
const OBTAIN_LIMIT: Duration = Duration::from_secs(10 * 60);

/// Whether what is missing may be brought from elsewhere.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Obtain,
    Say,
}

pub(super) struct Machine {
    kernel: PathBuf,
    dir: PathBuf,
}

impl Machine {
    /// Finds everything, or brings it.
    pub(super) fn find(context: &Context, missing: Missing) -> Result<Self, Cannot> {
        let dir = match env::var_os(CACHE) {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir),
            _ => context.scratch.join("pkvm"),
        };
        fs::create_dir_all(&dir).map_err(|e| Cannot::Run(format!("{}: {e}", dir.display())))?;
        let kernel = dir.join("vmlinuz");
        let lacking = || lacks(context, &kernel);
        if let (Some(_), Missing::Obtain) = (lacking(), missing) {
            let obtain = context.root.join("pkvm-oracle/obtain");
            // What it could not bring is what is still lacking.
            Cmd::new(&context.root, &obtain.display().to_string())
                .path(&dir)
                .limit(OBTAIN_LIMIT)
                .run();
        }
        if let Some(what) = lacking() {
            let how = format!("`pkvm-oracle/obtain {}` brings it", dir.display());
            return Err(Cannot::Run(format!("{what}; {how}")));
        }
        if !toolchains::has_target(&context.root, TARGET) {
            let add = Cmd::new(&context.root, "rustup").args(&["target", "add", TARGET]);
            if missing == Missing::Say || !add.run().success {
                let how = format!("`rustup target add {TARGET}` brings it");
                return Err(Cannot::Run(format!("no std for {TARGET}; {how}")));
            }
        }
        Ok(Self { kernel, dir: context.scratch.join("pkvm") })
    }

    /// Builds the agent and packs it with the scenarios.
    pub(super) fn pack(&self, context: &Context, random: Random) -> Result<PathBuf, Cannot> {
        let built = Cmd::cargo(&context.root)
            // The C compiler of this machine links for this machine.
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .args(&["build", "--release", "--package", "pkvm-agent", "--target", TARGET])
            .run();
        if !built.success {
            return Err(Cannot::Trust(format!("the agent does not build: {}", built.status)));
        }
        let agent = context.target.join(TARGET).join("release/pkvm-agent");
        let pack = || {
            let mut archive = Archive::default();
            archive.program("init", &read(&agent)?)?;
            archive.directory("scenarios")?;
            for path in scenario_files(&context.root)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                archive.file(&format!("scenarios/{name}"), &read(&path)?)?;
            }
            archive.file("generate", format!("{} {}", random.seed.0, random.number).as_bytes())?;
            let packed = self.dir.join("initrd.cpio");
            fs::create_dir_all(&self.dir).map_err(|e| format!("{}: {e}", self.dir.display()))?;
            fs::write(&packed, archive.finish()?)
                .map_err(|e| format!("{}: {e}", packed.display()))?;
            Ok(packed)
        };
        pack().map_err(Cannot::Trust)
    }

    /// Boots once, and returns what came over the console.
    pub(super) fn boot(
        &self,
        context: &Context,
        initrd: &Path,
        boot: u32,
    ) -> Result<String, Cannot> {
        let finished = Cmd::new(&context.root, EMULATOR)
            .args(&["-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a76"])
            .args(&["-smp", "2", "-m", "1024", "-accel", "tcg"])
            // What a device writes and reads back, of what the agent says.
            .args(&["-device", "vmcoreinfo"])
            .args(&["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"])
            .arg("-kernel")
            .path(&self.kernel)
            .arg("-initrd")
            .path(initrd)
            .arg("-append")
            // The kernel says only what is the end of it: the console is the agent's.
            .arg("console=ttyAMA0 kvm-arm.mode=protected panic=-1 quiet loglevel=1")
            .limit(BOOT_LIMIT)
            .show_and_ask();
        let log = self.dir.join(format!("console-{boot}.log"));
        fs::write(&log, finished.output())
            .map_err(|e| Cannot::Trust(format!("{}: {e}", log.display())))?;
        if !finished.success {
            let log = log.display();
            return Err(Cannot::Trust(format!("boot: {}; see {log}", finished.status)));
        }
        Ok(finished.stdout)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

pub(super) fn scenario_files(root: &Path) -> Result<Vec<PathBuf>, String> {
    let dir = root.join("pkvm-oracle/scenarios");
    let entries = fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// What is not there, of what `obtain` can bring.
fn lacks(context: &Context, kernel: &Path) -> Option<String> {
    let version = Cmd::new(&context.root, EMULATOR).arg("--version").ask();
    match major(&version.stdout) {
        _ if !version.success => Some(format!("no {EMULATOR}")),
        Some(major) if major >= OLDEST_EMULATOR => {
            (!kernel.is_file()).then(|| format!("no kernel at {}", kernel.display()))
        }
        _ => Some(format!("{EMULATOR} is older than {OLDEST_EMULATOR}")),
    }
}

/// `QEMU emulator version 10.0.2 (...)`
fn major(version: &str) -> Option<u32> {
    version.split_once("version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn the_emulator_says_how_old_it_is() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2)\n"), Some(10));
        assert_eq!(major("QEMU emulator version 7.2.22\n"), Some(7));
        assert_eq!(major("no such command"), None);
    }
}
