//! NUMA nodes: which there are, and memory of one of them.

// UNSAFETY: mbind(2) on a range of a `Mapping` that the caller owns.
#![expect(unsafe_code, reason = "the only file that speaks of NUMA policies to the kernel")]

use std::fs;
use std::path::Path;

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{NumaNode, index};
use crate::os::failed;
use crate::os::mapping::Mapping;

const ONLINE: &str = "/sys/devices/system/node/online";
const BITS: usize = libc::c_ulong::BITS as usize;

/// The nodes that are online, in ascending order; none where the kernel knows of no nodes.
pub(crate) fn online() -> Vec<NumaNode> {
    nodes_of(&fs::read_to_string(ONLINE).unwrap_or_default())
}

/// `0-2,5`.
fn nodes_of(list: &str) -> Vec<NumaNode> {
    let mut nodes = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse(), last.parse()) {
            nodes.extend((first..=last).map(NumaNode::new));
        }
    }
    nodes
}

/// Refuses a node that is not there.
///
/// # Errors
/// [`ErrorKind::MissingCapability`] names the node.
pub(crate) fn require(node: NumaNode) -> Result<(), Error> {
    if online().contains(&node) {
        return Ok(());
    }
    let list = fs::read_to_string(ONLINE).unwrap_or_else(|e| e.to_string());
    Err(missing().because(format!("NUMA node {node}: {ONLINE} says `{}`", list.trim())))
}

/// Refuses what the node cannot provide from its free memory and page cache: bound to one node, the
/// kernel kills somebody rather than go to another.
///
/// # Errors
/// [`ErrorKind::Exhausted`].
pub(crate) fn require_available(node: NumaNode, size: ByteSize) -> Result<(), Error> {
    match available_in(Path::new("/sys/devices/system/node"), node) {
        Some(available) if size > available => {
            Err(Error::new(Op::CreatePool, ErrorKind::Exhausted).because(format!(
                "{} bytes wanted, NUMA node {node} has {} available",
                size.get(),
                available.get()
            )))
        }
        _ => Ok(()),
    }
}

/// `None` where the kernel does not say.
fn available_in(root: &Path, node: NumaNode) -> Option<ByteSize> {
    let text = fs::read_to_string(root.join(format!("node{node}/meminfo"))).ok()?;
    // `Node 0 MemFree:        123 kB`
    let counters = ["MemFree:", "Active(file):", "Inactive(file):"];
    let kib = |line: &str| -> Option<u64> {
        let mut words = line.split_whitespace().skip(2);
        words.next().filter(|name| counters.contains(name))?;
        words.next()?.parse().ok()
    };
    Some(ByteSize::from_kib(text.lines().filter_map(kib).sum()))
}

/// Makes pages that the mapped file is yet to get come from this node, whoever touches them first:
/// on shared memory the policy is the file's.
///
/// # Errors
/// [`ErrorKind::MissingCapability`] if the kernel knows no policies, or the node has no memory;
/// [`ErrorKind::Os`] if the process may not use the node.
pub(crate) fn bind(map: &Mapping, at: usize, len: usize, node: NumaNode) -> Result<(), Error> {
    let target = map.at(at, len)?;
    let bit = index(u64::from(node.get()));
    let mut mask = vec![0; bit / BITS + 1];
    mask[bit / BITS] = 1 << (bit % BITS);
    // The kernel reads one bit less than it is told.
    let nr_bits = mask.len() * BITS + 1;
    // SAFETY: 1. the range lies in the caller's own mapping. 2. the mask has the bits that the
    // kernel is told of, and outlives the call. 3. no page is moved (no MPOL_MF_MOVE).
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            target,
            len,
            libc::c_long::from(libc::MPOL_BIND),
            mask.as_ptr(),
            nr_bits,
            libc::c_long::from(0_u8),
        )
    };
    if answer == 0 {
        return Ok(());
    }
    let os_error = std::io::Error::last_os_error();
    match rustix::io::Errno::from_io_error(&os_error).unwrap_or(rustix::io::Errno::IO) {
        e @ (rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => Err(missing()
            .errno_is(e.into())
            .because(format!("NUMA node {node}: mbind(2): no policies, or no memory there"))),
        e => Err(failed(Op::CreatePool, "mbind", e)),
    }
}

fn missing() -> Error {
    Error::new(Op::CreatePool, ErrorKind::MissingCapability)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_read() {
        let raw = |list| nodes_of(list).iter().map(|node| node.get()).collect::<Vec<_>>();
        assert_eq!(raw("0\n"), [0]);
        assert_eq!(raw("0-2,5,7-7\n"), [0, 1, 2, 5, 7]);
        assert_eq!(raw("\n"), [0_u32; 0]);
        assert_eq!(raw("3-1,x,-"), [0_u32; 0]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads /sys")]
    fn a_node_that_is_not_there_is_named() {
        let error = require(NumaNode::new(u32::MAX)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingCapability);
        assert!(error.to_string().contains("NUMA node 4294967295"), "{error}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "writes files")]
    fn free_memory_and_page_cache_of_a_node_are_added() {
        let root = std::env::temp_dir().join(format!("gmem-numa-{}", std::process::id()));
        fs::create_dir_all(root.join("node3")).unwrap();
        let text = "Node 3 MemTotal:  99 kB\nNode 3 MemFree:  4 kB\nNode 3 Inactive(file): 3 kB\n";
        fs::write(root.join("node3/meminfo"), text).unwrap();
        let node = NumaNode::new;
        assert_eq!(available_in(&root, node(3)), Some(ByteSize::from_kib(7)));
        assert_eq!(available_in(&root, node(4)), None);
        fs::remove_dir_all(root).unwrap();
    }
}
