//! The mesh in one thread: two replicas of every role on shared backends, and what strikes them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use mesh::{
    bus::{SharedBus, memory::MemoryBus},
    clock::Clock,
    identity::{Auth, Minter, Scopes, Verifier},
    layers::{self, ServerConfig},
    lifecycle::Lifecycle,
};
use proto::BuyerId;
use tokio::time::sleep;
use tonic::body::Body;
use tower::{ServiceExt, util::BoxCloneSyncService};

use crate::{
    bank::{Bank, Line},
    bus::FaultyBus,
    check,
    data::Databases,
    faults::{Disaster, Hands, Run},
    kv::{DUMP_EVERY, Kv},
    net::{Net, Replica, Role, Server},
    plan::{Plan, REPLICAS, Strike},
    ports::Faulty,
};

/// When every run begins, Unix milliseconds: runs must not differ by the machine's clock.
const BEGINNING: i64 = 1_790_000_000_000;

/// How often I2 is looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(30);

/// Between two attempts to start a role.
const BOOT_PAUSE: Duration = Duration::from_millis(200);

/// See the module.
pub struct World {
    pub run: Arc<Run>,
    pub plan: Plan,
    pub data: Databases,
    pub kv: Arc<Kv>,
    pub bus: SharedBus,
    pub bank: Arc<Bank>,
    pub net: Net,
    pub clock: Clock,
    pub minter: Minter,
    verifier: Arc<Verifier>,
    roles: Mutex<BTreeMap<(Role, usize), Slot>>,
}

/// A replica's present life.
struct Slot {
    hands: Hands,
    life: Lifecycle,
    lives: u32,
}

impl World {
    /// Nothing runs yet.
    pub async fn new(run: Arc<Run>, plan: Plan) -> anyhow::Result<Arc<Self>> {
        let clock = Clock::tokio_from(BEGINNING);
        let auth = Auth::hs256("a secret of the simulation, long enough".parse().map_err(anyhow::Error::msg)?);
        let net = Net::default();
        let bank = Bank::new(Hands::new(run.clone(), "bank"), net.clone(), clock.clone());
        Ok(Arc::new(Self {
            run,
            plan,
            data: Databases::open()?,
            kv: Arc::default(),
            bus: Arc::new(MemoryBus::new(clock.clone())),
            bank,
            net,
            minter: auth.minter(clock.clone()).context("the key is ours")?,
            verifier: auth.verifier(clock.clone()).await?,
            clock,
            roles: Mutex::default(),
        }))
    }

    /// Starts everybody, and dumps of the permits.
    pub async fn start(self: &Arc<Self>) {
        for role in Role::ALL {
            for replica in 0..REPLICAS {
                self.boot(role, replica).await;
            }
        }
        let kv = self.kv.clone();
        tokio::spawn(async move {
            loop {
                kv.dump();
                sleep(DUMP_EVERY).await;
            }
        });
        let world = self.clone();
        tokio::spawn(async move {
            // A dump of before knows nothing of what was granted since: until a rebuild it offers too much.
            while !world.plan.sets_permits_back() {
                if let Some(broken) = check::sample(&world) {
                    return world.run.alarm(broken);
                }
                sleep(SAMPLE_EVERY).await;
            }
        });
    }

    /// Starts a replica's next life, again and again until it stands.
    async fn boot(self: &Arc<Self>, role: Role, replica: usize) {
        loop {
            let lives = self.roles().get(&(role, replica)).map_or(0, |slot| slot.lives) + 1;
            let name = format!("{role:?}-{replica}.{lives}").to_lowercase();
            let hands = Hands::new(self.run.clone(), name);
            let life = Lifecycle::new();
            self.roles().insert((role, replica), Slot { hands: hands.clone(), life: life.clone(), lives });
            match self.start_role(role, &hands, &life).await {
                // It was struck while it started: whoever did so starts the next.
                Ok(_) if hands.is_dead() => return,
                Ok(server) => {
                    hands.note(|| "up".to_owned());
                    self.watch(&hands, &life);
                    return self.net.join(role, replica, Replica { server, hands, life });
                }
                Err(error) => {
                    hands.note(|| format!("did not start: {error:#}"));
                    if hands.is_dead() {
                        return;
                    }
                    hands.die();
                    life.kill();
                    sleep(BOOT_PAUSE).await;
                }
            }
        }
    }

    fn watch(self: &Arc<Self>, hands: &Hands, life: &Lifecycle) {
        let (world, hands, life) = (self.clone(), hands.clone(), life.clone());
        tokio::spawn(async move {
            let why = life.failed().await;
            if !hands.is_dead() {
                world.run.alarm(format!("{}: {why}", hands.who()));
            }
        });
    }

    fn roles(&self) -> std::sync::MutexGuard<'_, BTreeMap<(Role, usize), Slot>> {
        self.roles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn start_role(&self, role: Role, hands: &Hands, life: &Lifecycle) -> anyhow::Result<Server> {
        let (clock, plan) = (self.clock.clone(), &self.plan);
        let bus = FaultyBus::shared(hands, self.bus.clone());
        let link = |to| self.net.link(hands, to);
        let routes = match role {
            Role::Stock => {
                let store = Arc::new(stock_svc::store::sql::SqlStore::new(self.data.stock.clone()));
                let store = Faulty::<dyn stock_svc::store::Store>::new(hands, store);
                let permits = Faulty::new(hands, self.kv.clone());
                let backends = stock_svc::Backends { store, permits, bus, clock };
                stock_svc::start(plan.stock_config.clone(), backends, life).await?
            }
            Role::Order => {
                let store = Arc::new(order_svc::store::sql::SqlStore::new(self.data.order.clone()));
                let store = Faulty::<dyn order_svc::store::Store>::new(hands, store);
                order_svc::start(order_svc::Config::default(), order_svc::Backends { store, bus, clock }, life).await?
            }
            Role::Payment => {
                let store = Arc::new(payment_svc::store::sql::SqlStore::new(self.data.payment.clone()));
                let store = Faulty::<dyn payment_svc::store::Store>::new(hands, store);
                let provider = Line::to(&self.bank, hands);
                let backends = payment_svc::Backends { store, bus, clock, provider };
                payment_svc::start(plan.payment_config.clone(), backends, life).await?
            }
            Role::Coordinator => {
                let store = Arc::new(coordinator::store::sql::SqlStore::new(self.data.coordinator.clone()));
                let store = Faulty::<dyn coordinator::store::Store>::new(hands, store);
                let (stock, order, payment) = (link(Role::Stock), link(Role::Order), link(Role::Payment));
                let backends = coordinator::Backends { store, bus, clock, stock, order, payment };
                coordinator::start(plan.coordinator_config.clone(), backends, life).await?
            }
            Role::Gateway => {
                let (stock, order, payment) = (link(Role::Stock), link(Role::Order), link(Role::Payment));
                let (coordinator, verifier) = (link(Role::Coordinator), self.verifier.clone());
                let backends = gateway::Backends { bus, clock, verifier, stock, order, payment, coordinator };
                let door = gateway::start(gateway::Config::default(), backends, life).await?;
                let door = door
                    .map_request(|request: http::Request<Body>| request)
                    .map_response(|response: http::Response<_>| response.map(Body::new));
                return Ok(BoxCloneSyncService::new(door));
            }
        };
        Ok(BoxCloneSyncService::new(layers::server(routes.prepare(), ServerConfig::default())))
    }

    /// Does what the plan says strikes, until all is calm.
    pub async fn strike(self: &Arc<Self>, strike: Strike) {
        let Strike { disaster, role, replica, lasts, .. } = strike;
        let outside: Arc<str> = "outside".into();
        match disaster {
            Disaster::Crash => {
                let Some((hands, life)) = self.present(role, replica) else { return };
                self.run.disaster(disaster, hands.who());
                self.net.leave(role, replica);
                hands.die();
                life.kill();
                sleep(lasts).await;
                self.boot(role, replica).await;
            }
            Disaster::Freeze => {
                let Some((hands, _)) = self.present(role, replica) else { return };
                self.run.disaster(disaster, hands.who());
                hands.freeze(lasts);
            }
            Disaster::KvWiped => {
                self.run.disaster(disaster, &outside);
                self.kv.wipe();
            }
            Disaster::KvSetBack => {
                self.run.disaster(disaster, &outside);
                self.kv.set_back();
            }
            Disaster::BusAway => {
                self.run.disaster(disaster, &outside);
                self.run.take_bus_away(lasts);
            }
        }
    }

    /// A replica that lives.
    fn present(&self, role: Role, replica: usize) -> Option<(Hands, Lifecycle)> {
        let roles = self.roles();
        let slot = roles.get(&(role, replica))?;
        (!slot.hands.is_dead()).then(|| (slot.hands.clone(), slot.life.clone()))
    }

    /// Nothing goes wrong any more: who is frozen goes on, and what the bank never decided it decides.
    pub fn calm(&self) {
        self.run.calm();
        for slot in self.roles().values() {
            slot.hands.thaw();
        }
        self.bank.decide_all();
    }

    /// A token.
    pub fn token(&self, subject: &BuyerId, scopes: Scopes) -> String {
        let minted = self.minter.mint(subject, scopes, Duration::from_secs(3_600));
        format!("Bearer {}", minted.expect("a token can be minted"))
    }
}
