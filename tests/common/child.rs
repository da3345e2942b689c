//! A test in a process of its own.

use std::env;
use std::process::Command;

/// Set in the copy. Settings of the host are the first process's to make, which puts them back whatever
/// becomes of the copy.
pub(crate) const CHILD: &str = "GMEM_TEST_CHILD";
const DONE: &str = "the child has seen what it should";

/// Runs `body` in a copy of this process in which nothing else runs. `test` is the caller's name, so that
/// the copy ends up here again.
pub(crate) fn alone(test: &str, body: impl FnOnce()) {
    if env::var_os(CHILD).is_some() {
        body();
        println!("{DONE}");
        return;
    }
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout).into_owned();
    let errors = String::from_utf8_lossy(&child.stderr);
    let is_good = child.status.success() && output.contains(DONE);
    assert!(is_good, "{:?}\n{output}\n{errors}", child.status);
    print!("{output}");
}
