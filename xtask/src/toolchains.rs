//! Which toolchains, components and targets are installed. Nothing is installed from here.

use std::path::Path;

use crate::shell::Cmd;

/// The newest installed toolchain whose name starts with this: `nightly`, `1.85`.
pub(crate) fn installed(root: &Path, release: &str) -> Result<String, String> {
    let list = Cmd::new(root, "rustup").args(&["toolchain", "list"]).ask();
    if !list.success {
        return Err(format!("rustup {}", list.status));
    }
    pick(&list.stdout, release).ok_or_else(|| format!("no {release} toolchain is installed"))
}

fn pick(list: &str, release: &str) -> Option<String> {
    let of_release = |name: &&str| {
        name.strip_prefix(release)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
    };
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(of_release)
        .max()
        .map(String::from)
}

/// Whether `cargo` of this toolchain has a subcommand, asked for its version.
pub(crate) fn has_subcommand(root: &Path, toolchain: &str, name: &str) -> bool {
    Cmd::cargo_of(root, toolchain).args(&[name, "--version"]).ask().success
}

/// Whether the standard library for a target is there.
pub(crate) fn has_target(root: &Path, target: &str) -> bool {
    let sysroot = Cmd::new(root, "rustc").args(&["--print", "sysroot"]).ask();
    let lib = Path::new(sysroot.stdout.trim()).join("lib/rustlib").join(target).join("lib");
    sysroot.success && lib.is_dir()
}

/// Whether the standard library's source, which Miri builds its own one from, is there.
pub(crate) fn has_std_source(root: &Path, toolchain: &str) -> bool {
    let sysroot = Cmd::new(root, "rustc").env_remove("RUSTUP_TOOLCHAIN");
    let sysroot = sysroot.args(&[&format!("+{toolchain}"), "--print", "sysroot"]).ask();
    let source = Path::new(sysroot.stdout.trim()).join("lib/rustlib/src/rust/library");
    sysroot.success && source.is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_not_a_mere_prefix() {
        let list = "stable-x86_64-unknown-linux-gnu (active, default)\n\
                    nightly-x86_64-unknown-linux-gnu\n\
                    1.8.0-x86_64-unknown-linux-gnu\n\
                    1.85.0-x86_64-unknown-linux-gnu\n\
                    1.85.1-x86_64-unknown-linux-gnu\n";
        let picked = |release| pick(list, release);
        assert_eq!(picked("1.85").as_deref(), Some("1.85.1-x86_64-unknown-linux-gnu"));
        assert_eq!(picked("nightly").as_deref(), Some("nightly-x86_64-unknown-linux-gnu"));
        assert_eq!(picked("1.8").as_deref(), Some("1.8.0-x86_64-unknown-linux-gnu"));
        assert_eq!(picked("1.86"), None);
    }
}
