//! What every guest kernel is told, whatever the VMM.

/// A panic ends the machine, random numbers come from the processor, and nothing is probed for that no machine has.
pub(crate) const COMMON: &[&str] = &[
    "console=ttyS0",
    "8250.nr_uarts=1",
    "quiet",
    "panic=-1",
    "random.trust_cpu=on",
    "rcupdate.rcu_expedited=1",
    "cryptomgr.notests",
    "audit=0",
    "i8042.noaux",
    "pci=off",
    "raid=noautodetect",
    "debugfs=off",
];

/// The whole command line: what is common, what a VMM adds, what a machine adds.
pub(crate) fn line<'a>(of_vmm: impl IntoIterator<Item = &'a str>, of_machine: &'a [String]) -> String {
    let common = COMMON.iter().copied();
    let words: Vec<&str> = common.chain(of_vmm).chain(of_machine.iter().map(String::as_str)).collect();
    words.join(" ")
}
