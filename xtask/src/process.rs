//! Child processes and signals.
//!
//! Promises: a child started here never outlives the value that stands for it, and never outlives xtask itself where
//! the system allows (Linux with `setpriv`: the kernel signals it when xtask is killed). Every child has a process
//! group of its own, so that Ctrl-C reaches xtask alone and it can stop things in order. The first signal asks,
//! the second forces.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    net::{Ipv4Addr, TcpListener},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

/// How often a condition is looked at. Short enough not to be felt, long enough to cost nothing.
const POLL: Duration = Duration::from_millis(25);

/// Counts the signals that ask this program to end. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicUsize>);

/// The error of a wait that a signal ended.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

impl Interrupt {
    /// Counts SIGINT, SIGTERM and SIGHUP from now on instead of dying of them.
    pub fn watch() -> Result<Self> {
        let interrupt = Self::default();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("watching for signals")?;
        let count = interrupt.0.clone();
        thread::spawn(move || {
            for _ in signals.forever() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Ok(interrupt)
    }

    /// Somebody asked to end.
    pub fn is_pending(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }

    /// Somebody asked twice: no more patience.
    pub fn is_forced(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 1
    }

    /// An error once somebody asked to end.
    pub fn check(&self) -> Result<()> {
        if self.is_pending() { Err(Interrupted.into()) } else { Ok(()) }
    }
}

/// Waits until `check` answers true. `false` when `limit` passed first, an error when interrupted or `check` fails.
pub fn wait_until(limit: Duration, interrupt: &Interrupt, mut check: impl FnMut() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        interrupt.check()?;
        if check()? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(POLL);
    }
}

/// Runs a command to its end with this terminal's output. An interrupt is passed on to everything it started.
pub fn run(command: &mut Command, interrupt: &Interrupt) -> Result<ExitStatus> {
    run_beside(command, interrupt, || Ok(()))
}

/// The same, and does something else now and then until the command has ended.
pub fn run_beside(
    command: &mut Command,
    interrupt: &Interrupt,
    mut now_and_then: impl FnMut() -> Result<()>,
) -> Result<ExitStatus> {
    interrupt.check()?;
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).process_group(0).spawn().with_context(|| format!("starting {program}"))?;
    let mut group = Group { leader: child, ended: false, interrupt };
    loop {
        if let Some(status) = group.leader.try_wait().with_context(|| format!("waiting for {program}"))? {
            group.ended = true;
            return Ok(status);
        }
        // Dropping the group stops it.
        interrupt.check()?;
        now_and_then()?;
        thread::sleep(POLL);
    }
}

/// Runs a command whose output only matters if it fails: it goes to `log`, and its end into the error.
pub fn run_quietly(command: &mut Command, log: &Path, interrupt: &Interrupt) -> Result<()> {
    let output = append(log)?;
    command.stdout(output.try_clone()?).stderr(output);
    let status = run(command, interrupt)?;
    if !status.success() {
        bail!("{} ended with {status}:\n{}", command.get_program().to_string_lossy(), tail(log, 30));
    }
    Ok(())
}

/// What a command prints, trimmed; `None` when it cannot be run or fails.
pub fn stdout_of(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The exit code that stands for how a child ended, as a shell would give it.
pub fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// A command and all that it started, gone when dropped before its end.
struct Group<'a> {
    leader: Child,
    ended: bool,
    interrupt: &'a Interrupt,
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        // Long enough for a package being configured, which must not be left half done; a second signal cuts it short.
        const PATIENCE: Duration = Duration::from_secs(60);
        if self.ended {
            return;
        }
        let group = pid_of(&self.leader);
        // A group that has just ended by itself cannot be signalled, and need not be.
        let _ = killpg(group, Signal::SIGINT);
        wait_for_exit(&mut self.leader, PATIENCE, self.interrupt);
        // What is left ignores SIGINT, as the background jobs of a shell do, or has lost its leader.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.leader.wait();
    }
}

/// A long-running child with a log file, stopped when dropped.
pub struct Daemon {
    name: String,
    command: Command,
    child: Child,
    log: PathBuf,
    stop_with: Signal,
    interrupt: Interrupt,
}

impl Daemon {
    /// Starts `command` (made by [`daemon_command`] with the same signal), its output appended to `log`.
    pub fn start(
        name: &str,
        mut command: Command,
        log: &Path,
        stop_with: Signal,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let output = append(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let (name, log, interrupt) = (name.to_owned(), log.to_owned(), interrupt.clone());
        Ok(Self { name, command, child, log, stop_with, interrupt })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id; the dead one's until it is restarted.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("looking after {}", self.name))
    }

    /// Starts the same command again after it ended.
    pub fn restart(&mut self) -> Result<()> {
        self.child = self.command.spawn().with_context(|| format!("restarting {}", self.name))?;
        Ok(())
    }

    /// Kills it where it stands.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().and_then(|()| self.child.wait()).with_context(|| format!("killing {}", self.name))?;
        Ok(())
    }

    /// Asks it to end and does not wait.
    pub fn ask_to_stop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // Not yet waited for, so the id is still its own even if it has just died.
            let _ = kill(pid_of(&self.child), self.stop_with);
        }
    }

    /// Asks it to end, waits up to `patience`, then kills it. A second interrupt ends the patience.
    pub fn stop(&mut self, patience: Duration) {
        self.ask_to_stop();
        if !wait_for_exit(&mut self.child, patience, &self.interrupt) {
            eprintln!("{} (pid {}) did not stop: killed", self.name, self.pid());
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(20));
    }
}

/// A command for a [`Daemon`]: where `setpriv` is there, the kernel sends the child `signal` should xtask be killed.
/// That happens when the thread that started it ends, so daemons are started from the main thread.
pub fn daemon_command(program: &Path, signal: Signal) -> Command {
    match which("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", signal.as_str().trim_start_matches("SIG"), "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

fn wait_for_exit(child: &mut Child, patience: Duration, interrupt: &Interrupt) -> bool {
    let deadline = Instant::now() + patience;
    while let Ok(None) = child.try_wait() {
        if Instant::now() >= deadline || interrupt.is_forced() {
            return false;
        }
        thread::sleep(POLL);
    }
    true
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a process id fits"))
}

fn append(log: &Path) -> Result<File> {
    let open = OpenOptions::new().create(true).append(true).open(log);
    open.with_context(|| format!("opening {}", log.display()))
}

/// The last lines of a log, indented for a message. A log that cannot be read says so instead.
pub fn tail(log: &Path, lines: usize) -> String {
    // Enough for any sensible number of lines, however long the log has grown.
    const WINDOW: u64 = 64 * 1024;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(end.saturating_sub(WINDOW)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) if bytes.is_empty() => "    (nothing in its log)".to_owned(),
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<_> = text.lines().collect();
            let last = &all[all.len().saturating_sub(lines)..];
            last.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
        }
        Err(error) => format!("    (its log {} cannot be read: {error})", log.display()),
    }
}

/// The first of the places programs live in that has `program`: PATH, then the system folders that a user's PATH may lack.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// A TCP port of 127.0.0.1 that nobody listens on.
///
/// Taken from below the range that Linux gives to outgoing connections (32768 up): a server killed and restarted on
/// its port must not find it in use by some client's end of a connection.
pub fn free_port() -> Result<u16> {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // Processes that look at the same time start at different places.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let start = std::process::id().wrapping_mul(7919).wrapping_add(now);
    for _ in 0..1_000 {
        let step = u32::try_from(NEXT.fetch_add(1, Ordering::Relaxed)).unwrap_or(0);
        let port = u16::try_from(FIRST + start.wrapping_add(step) % COUNT).expect("the range is within a port's");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port between {FIRST} and {}", FIRST + COUNT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_gone_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = daemon_command(&which("sleep").unwrap(), Signal::SIGTERM);
        command.arg("600");
        let log = dir.path().join("log");
        let daemon = Daemon::start("sleep", command, &log, Signal::SIGTERM, &Interrupt::default()).unwrap();
        let pid = Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
        assert_eq!(kill(pid, None), Ok(()));
        drop(daemon);
        assert_eq!(kill(pid, None), Err(nix::errno::Errno::ESRCH));
    }

    #[test]
    fn a_daemon_that_died_starts_again_into_the_same_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = daemon_command(&which("sh").unwrap(), Signal::SIGTERM);
        command.args(["-c", "echo started"]);
        let log = dir.path().join("log");
        let interrupt = Interrupt::default();
        let mut daemon = Daemon::start("echo", command, &log, Signal::SIGTERM, &interrupt).unwrap();
        let limit = Duration::from_secs(30);
        for _ in 0..2 {
            assert!(wait_until(limit, &interrupt, || Ok(daemon.exited()?.is_some())).unwrap());
            daemon.restart().unwrap();
        }
        assert!(wait_until(limit, &interrupt, || Ok(daemon.exited()?.is_some())).unwrap());
        assert_eq!(tail(&log, 10), ["    started"; 3].join("\n"));
        assert_eq!(tail(&log, 1), "    started");
    }

    #[test]
    fn an_interrupt_stops_a_command_and_all_it_started() {
        let interrupt = Interrupt::default();
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let (asking, written) = (interrupt.clone(), pid_file.clone());
        let asker = thread::spawn(move || {
            wait_until(Duration::from_secs(30), &Interrupt::default(), || Ok(written.exists())).unwrap();
            asking.0.fetch_add(1, Ordering::SeqCst);
        });
        // A shell's background job ignores SIGINT; renaming makes the file appear whole.
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 600 & echo $! > $0.new; mv $0.new $0; wait"]).arg(&pid_file);
        let error = run(&mut command, &interrupt).unwrap_err();
        assert!(error.is::<Interrupted>());
        asker.join().unwrap();
        let pid = Pid::from_raw(std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap());
        // It is not this process's child: whoever inherits it may take a moment to let go of it.
        let gone = || Ok(!is_alive(pid));
        assert!(wait_until(Duration::from_secs(30), &Interrupt::default(), gone).unwrap());
    }

    /// A zombie is dead, even where nobody reaps it.
    fn is_alive(pid: Pid) -> bool {
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => !stat.contains(") Z "),
            Err(_) => kill(pid, None).is_ok() && !Path::new("/proc/self").exists(),
        }
    }

    #[test]
    fn free_ports_are_distinct_and_below_the_ephemeral_range() {
        let ports: std::collections::BTreeSet<_> = (0..20).map(|_| free_port().unwrap()).collect();
        assert_eq!(ports.len(), 20);
        assert!(ports.iter().all(|port| (10_000..32_000).contains(port)));
    }
}
