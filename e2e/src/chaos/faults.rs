//! The faults, each injected, lifted and timed while buyers come.

use std::{
    fmt, fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use fred::prelude::ClientLike;
use futures::future::join_all;
use nix::sys::signal::Signal;
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use tokio::time::sleep;

use super::{
    Chaos,
    fleet::{End, Role},
    proxy,
    report::Row,
    servers::Server,
};

/// How long the calls of a replica are on their way before it is stopped in the middle of them.
const MID_STEP: Duration = Duration::from_millis(200);
/// How long a paused process sleeps: longer than every lease and lock of its peers that it may hold.
const PAUSE: Duration = Duration::from_secs(10);
/// The mesh accepts and locks again within this, whatever it was that was lifted.
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);
/// A stop that was asked for takes no longer: the grace of `seckill`, and some.
const STOP_LIMIT: Duration = Duration::from_secs(25);
/// What was sent to a door before it was taken out of rotation has arrived by then.
const DEREGISTRATION: Duration = Duration::from_millis(500);
/// How long after its deadline an order may wait for the sweep, when the bus that would have told is away.
const SWEEP_BOUND: Duration = Duration::from_secs(10);

/// A kind of fault. What exactly it hits is a matter of the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    /// SIGKILL one replica of a role, and start it again
    KillReplica,
    /// SIGKILL both replicas of a role at once
    KillRole,
    /// SIGKILL PostgreSQL, Redis or NATS
    KillServer,
    /// SIGKILL two things at once: roles, servers or one of each
    KillPair,
    /// SIGSTOP one replica for ten seconds: it wakes up when its work was taken over
    Zombie,
    /// Redis FLUSHALL
    RedisFlush,
    /// Redis killed and started from a dump that is one second old (E14)
    RedisBack,
    /// NATS away for longer than a payment window: what is due expires all the same (E18)
    NatsAway,
    /// A wire between two processes cut, black-holed or slow
    Network,
    /// Every replica of every role restarted, one after the other, with no request lost
    Rolling,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

/// Something that can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Replica(usize),
    Server(Server),
}

impl Kind {
    /// Every kind, as often as it takes to reach every role and server.
    pub fn deck(rng: &mut impl Rng) -> Vec<Card> {
        let mut deck = Vec::new();
        for role in Role::ALL {
            deck.extend([Card::KillReplica(role), Card::KillRole(role)]);
        }
        deck.extend(Server::ALL.map(Card::KillServer));
        deck.extend([Card::KillPair; 4]);
        deck.extend([Role::Coordinator, Role::Stock].map(Card::Zombie));
        deck.extend([Role::Gateway, Role::Order, Role::Payment].choose(rng).map(|&role| Card::Zombie(role)));
        deck.extend([Card::RedisFlush, Card::RedisBack, Card::NatsAway, Card::Rolling]);
        deck.extend([Card::Network; 4]);
        deck.shuffle(rng);
        deck
    }
}

/// A fault to come.
#[derive(Clone, Copy, Debug)]
pub enum Card {
    /// One replica.
    KillReplica(Role),
    /// Both replicas.
    KillRole(Role),
    /// A server.
    KillServer(Server),
    /// Any two.
    KillPair,
    /// A replica stands still.
    Zombie(Role),
    /// Permits lost.
    RedisFlush,
    /// Permits of a second ago.
    RedisBack,
    /// No bus.
    NatsAway,
    /// A bad wire.
    Network,
    /// Everything anew.
    Rolling,
}

impl Card {
    /// What it is one of.
    pub fn kind(self) -> Kind {
        match self {
            Card::KillReplica(_) => Kind::KillReplica,
            Card::KillRole(_) => Kind::KillRole,
            Card::KillServer(_) => Kind::KillServer,
            Card::KillPair => Kind::KillPair,
            Card::Zombie(_) => Kind::Zombie,
            Card::RedisFlush => Kind::RedisFlush,
            Card::RedisBack => Kind::RedisBack,
            Card::NatsAway => Kind::NatsAway,
            Card::Network => Kind::Network,
            Card::Rolling => Kind::Rolling,
        }
    }
}

/// What happened, before it is known how long the mesh took to get over it.
struct Injected {
    detail: String,
    /// When it was lifted: the restart's beginning.
    lifted: Instant,
    /// From the restart's beginning to ready, of whoever took longest.
    ready: Option<Duration>,
    kills: usize,
}

impl Chaos {
    /// One fault, from calm to calm.
    pub async fn inject(&mut self, card: Card) -> Result<()> {
        let began = Instant::now();
        let injected = match card {
            Card::KillReplica(role) => {
                let all: Vec<_> = self.fleet.of(role).collect();
                let one = *all.choose(&mut self.rng).context("a role has replicas")?;
                self.kill(&[Victim::Replica(one)]).await?
            }
            Card::KillRole(role) => {
                let all: Vec<_> = self.fleet.of(role).map(Victim::Replica).collect();
                self.kill(&all).await?
            }
            Card::KillServer(server) => self.kill(&[Victim::Server(server)]).await?,
            Card::KillPair => {
                let pair = self.pair();
                self.kill(&pair).await?
            }
            Card::Zombie(role) => self.zombie(role).await?,
            Card::RedisFlush => self.redis_flush().await?,
            Card::RedisBack => self.redis_back().await?,
            Card::NatsAway => self.nats_away().await?,
            Card::Network => self.network().await?,
            Card::Rolling => self.rolling().await?,
        };
        let recovered = self.load.locks_again(injected.lifted, RECOVERY_LIMIT).await;
        if recovered.is_none() {
            let what = format!("{} {}: nothing locked {RECOVERY_LIMIT:?} after it", card.kind(), injected.detail);
            self.load.violation(what);
        }
        self.revive()?;
        let silence = self.load.longest_silence(began, Instant::now());
        self.report.add(Row {
            at: began - self.started,
            kind: card.kind(),
            detail: injected.detail,
            down: injected.lifted - began,
            ready: injected.ready,
            recovered,
            silence,
            kills: injected.kills,
        });
        Ok(())
    }

    /// Two of everything, not both replicas of one role: that is a fault of its own.
    fn pair(&mut self) -> Vec<Victim> {
        let mut roles = Role::ALL;
        roles.shuffle(&mut self.rng);
        let mut servers = Server::ALL;
        servers.shuffle(&mut self.rng);
        let whole = |role: Role| self.fleet.of(role).map(Victim::Replica).collect::<Vec<_>>();
        match self.rng.random_range(0..3) {
            0 => [whole(roles[0]), whole(roles[1])].concat(),
            1 => [whole(roles[0]), vec![Victim::Server(servers[0])]].concat(),
            _ => servers[..2].iter().map(|&server| Victim::Server(server)).collect(),
        }
    }

    /// SIGKILL to all of them, a moment without, then all again.
    async fn kill(&mut self, victims: &[Victim]) -> Result<Injected> {
        for &victim in victims {
            match victim {
                Victim::Replica(index) => self.fleet.kill(index),
                Victim::Server(server) => self.keeper.kill(server).await?,
            }
        }
        self.pause(500..2500).await;
        let lifted = Instant::now();
        // As after a power cut: all are started at once, whoever needs whom.
        let mut ready = Duration::ZERO;
        for &victim in victims {
            if let Victim::Replica(index) = victim {
                self.fleet.launch(index)?;
            }
        }
        for &victim in victims {
            if let Victim::Server(server) = victim {
                ready = ready.max(self.keeper.start(server).await?);
            }
        }
        for &victim in victims {
            if let Victim::Replica(index) = victim {
                ready = ready.max(self.fleet.until_ready(index, lifted).await?);
            }
        }
        let names: Vec<_> = victims.iter().map(|&victim| self.name(victim)).collect();
        Ok(Injected { detail: names.join(", "), lifted, ready: Some(ready), kills: victims.len() })
    }

    fn name(&self, victim: Victim) -> String {
        match victim {
            Victim::Replica(index) => self.fleet.replicas[index].name.clone(),
            Victim::Server(server) => server.to_string(),
        }
    }

    /// Stops a replica that has work in hand: what it called for is still on slow wires then, and is answered while it
    /// stands still.
    async fn zombie(&mut self, role: Role) -> Result<Injected> {
        let all: Vec<_> = self.fleet.of(role).collect();
        let one = *all.choose(&mut self.rng).context("a role has replicas")?;
        let wires: Vec<End> =
            self.fleet.pairs().into_iter().filter(|(from, _)| *from == one).map(|(_, to)| to).collect();
        for &to in &wires {
            self.fleet.set(one, to, proxy::Fault::Delay(MID_STEP));
        }
        sleep(2 * MID_STEP).await;
        self.fleet.signal(one, Signal::SIGSTOP)?;
        for &to in &wires {
            self.fleet.set(one, to, proxy::Fault::None);
        }
        sleep(PAUSE).await;
        self.fleet.signal(one, Signal::SIGCONT)?;
        let detail = self.name(Victim::Replica(one));
        Ok(Injected { detail, lifted: Instant::now(), ready: None, kills: 0 })
    }

    async fn redis_flush(&mut self) -> Result<Injected> {
        let lifted = Instant::now();
        self.redis().await?.flushall::<()>(false).await.context("FLUSHALL")?;
        Ok(Injected { detail: "FLUSHALL".to_owned(), lifted, ready: None, kills: 0 })
    }

    async fn redis_back(&mut self) -> Result<Injected> {
        let redis = self.redis().await?;
        let saved: String = command(&redis, "SAVE", &[]).await?;
        anyhow::ensure!(saved == "OK", "SAVE answered {saved}");
        sleep(Duration::from_secs(1)).await;
        let place: Vec<String> = command(&redis, "CONFIG", &["GET", "dir"]).await?;
        self.keeper.kill(Server::Redis).await?;
        let lifted = Instant::now();
        let ready = self.keeper.start(Server::Redis).await?;
        // Loaded; the next one who kills Redis means it to be empty.
        let dump = std::path::Path::new(place.last().context("Redis has a folder")?).join("dump.rdb");
        fs::remove_file(&dump).with_context(|| format!("removing {}", dump.display()))?;
        Ok(Injected { detail: "one second back".to_owned(), lifted, ready: Some(ready), kills: 1 })
    }

    /// Orders that wait for payment when NATS goes: they expire while it is away, by the sweep.
    async fn nats_away(&mut self) -> Result<Injected> {
        const WINDOW: Duration = Duration::from_secs(4);
        const BUYERS: usize = 10;
        let sale = self.load.create_sale("away", 1000, WINDOW).await?;
        let buyers = (0..BUYERS).map(|buyer| {
            let (load, sale) = (self.load.clone(), sale.clone());
            async move { load.hold(&format!("{sale}-{buyer}"), &sale).await }
        });
        let orders: Vec<String> = join_all(buyers).await.into_iter().flatten().collect();
        let states = join_all(orders.iter().map(|order| self.load.state(order))).await;
        let awaiting = states.iter().flatten().filter(|state| *state == "AWAITING_PAYMENT").count();
        if awaiting < BUYERS {
            self.load.violation(format!("E18: {awaiting} of {BUYERS} orders await payment when NATS goes"));
        }
        self.keeper.kill(Server::Nats).await?;
        let due = Instant::now() + WINDOW;
        sleep(WINDOW).await;
        let mut waiting = orders.clone();
        while !waiting.is_empty() && due.elapsed() < SWEEP_BOUND {
            sleep(Duration::from_millis(100)).await;
            let states = join_all(waiting.iter().map(|order| self.load.state(order))).await;
            let mut states = states.into_iter();
            waiting.retain(|_| states.next().flatten().as_deref() != Some("EXPIRED"));
        }
        if !waiting.is_empty() {
            let what = format!("E18: {waiting:?} not expired {SWEEP_BOUND:?} after their deadline, NATS away");
            self.load.violation(what);
        }
        let swept = due.elapsed();
        let lifted = Instant::now();
        let ready = self.keeper.start(Server::Nats).await?;
        let detail =
            format!("{} orders expired without NATS, the last {:.1} s late", orders.len(), swept.as_secs_f64());
        Ok(Injected { detail, lifted, ready: Some(ready), kills: 1 })
    }

    async fn network(&mut self) -> Result<Injected> {
        let pairs = self.fleet.pairs();
        let &(from, to) = pairs.choose(&mut self.rng).context("a mesh has wires")?;
        let faults = [proxy::Fault::Cut, proxy::Fault::BlackHole, proxy::Fault::Delay(Duration::from_millis(150))];
        let &fault = faults.choose(&mut self.rng).context("there are faults")?;
        // Half of the time both replicas suffer: then nobody stands in.
        let both = self.rng.random_bool(0.5);
        let role = self.fleet.replicas[from].role;
        let sufferers: Vec<usize> = if both { self.fleet.of(role).collect() } else { vec![from] };
        for &from in &sufferers {
            self.fleet.set(from, to, fault);
        }
        self.pause(3000..9000).await;
        let lifted = Instant::now();
        for &from in &sufferers {
            self.fleet.set(from, to, proxy::Fault::None);
        }
        let names: Vec<_> = sufferers.iter().map(|&index| self.fleet.replicas[index].name.clone()).collect();
        let to = match to {
            End::Role(role) => role.to_string(),
            other => format!("{other:?}").to_lowercase(),
        };
        Ok(Injected { detail: format!("{} to {to}: {fault:?}", names.join(", ")), lifted, ready: None, kills: 0 })
    }

    /// A door is taken out of rotation before it is stopped, as any load balancer does; the other roles just stop.
    async fn rolling(&mut self) -> Result<Injected> {
        let (before, mut slowest) = (self.load.unanswered(0).len(), Duration::ZERO);
        let mut slowest_stop = (Duration::ZERO, String::new());
        for index in 0..self.fleet.replicas.len() {
            let replica = &self.fleet.replicas[index];
            let is_door = (replica.role == Role::Gateway).then_some(replica.process.address);
            if let Some(door) = is_door {
                self.load.rotate(door, false);
                sleep(DEREGISTRATION).await;
            }
            let replica = &mut self.fleet.replicas[index];
            let asked = Instant::now();
            match replica.process.stop(STOP_LIMIT).await {
                Ok(status) if status.success() => {
                    slowest_stop = slowest_stop.max((asked.elapsed(), replica.name.clone()))
                }
                Ok(status) => {
                    self.load.violation(format!("{} was asked to stop and ended with {status}", replica.name))
                }
                Err(error) => {
                    self.load.violation(format!("{} did not stop when asked: {error}", replica.name));
                    replica.process.kill();
                }
            }
            slowest = slowest.max(self.fleet.restart(index).await?);
            if let Some(door) = is_door {
                self.load.rotate(door, true);
            }
        }
        for lost in self.load.unanswered(before) {
            self.load.violation(format!("rolling restart, no answer: {lost}"));
        }
        let (took, who) = slowest_stop;
        let detail = format!("every replica; {who} took longest to stop, {:.1} s", took.as_secs_f64());
        Ok(Injected { detail, lifted: Instant::now(), ready: Some(slowest), kills: 0 })
    }

    async fn redis(&self) -> Result<fred::prelude::Client> {
        let url = self.storage.redis_url.as_deref().context("Redis is needed")?;
        let config = fred::prelude::Config::from_url(url).context("reading the URL of Redis")?;
        let client = fred::prelude::Builder::from_config(config).build().context("a client of Redis")?;
        client.init().await.context("reaching Redis")?;
        Ok(client)
    }

    /// This many milliseconds.
    async fn pause(&mut self, range: std::ops::Range<u64>) {
        sleep(Duration::from_millis(self.rng.random_range(range))).await;
    }
}

async fn command<T: fred::types::FromValue>(
    redis: &fred::prelude::Client,
    name: &'static str,
    arguments: &[&str],
) -> Result<T> {
    let command = fred::types::CustomCommand::new_static(name, fred::types::ClusterHash::FirstKey, false);
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let value: fred::types::Value =
        redis.custom(command, arguments).await.with_context(|| format!("{name} to Redis"))?;
    value.convert().with_context(|| format!("what Redis answered to {name}"))
}
