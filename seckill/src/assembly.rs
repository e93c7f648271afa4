//! How the mesh is put together: the same `start` of each role, whether all five share a process or each has its own.
//!
//! Sockets are bound first, so that an address that is taken is said at once; roles are started from the bottom up
//! (stock, payment, order, coordinator, gateway) and stopped from the top down, so that whoever is still running finds
//! what it calls.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use clap::Args;
use mesh::{
    identity::{AuthArgs, Minter},
    layers::{self, ClientConfig, ServerConfig},
    lifecycle::Lifecycle,
    link::Link,
    readiness::{Readiness, ReadyFlag},
    serve,
};
use migrations::Service;
use stock_svc::permits::SharedPermits;
use tonic::service::Routes;
use tower::ServiceExt;

use crate::{
    backends::Backends,
    config::{CommonArgs, RoleArgs, RoleConfigs},
};

/// What an all-in-one is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// What every process has.
    pub common: CommonArgs,
    /// The gateway's address; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The admin address; port 0 picks a free one.
    pub admin_listen: Option<SocketAddr>,
    /// The roles' own options.
    pub roles: RoleConfigs,
}

/// A running process of the mesh: all five roles, or one.
#[derive(Debug)]
pub struct Mesh {
    /// Where the gateway, or the one role, serves.
    pub address: SocketAddr,
    /// Where metrics and health are.
    pub admin: Option<SocketAddr>,
    /// Mints tokens that this mesh takes; none where the gateway is elsewhere or the key is somebody else's.
    pub minter: Option<Minter>,
    /// What is behind the ports.
    pub backends: Backends,
    /// The permits, where stock-svc is in this process.
    pub permits: Option<SharedPermits>,
    /// In the order in which they were started.
    roles: Vec<Lifecycle>,
    /// Bus and admin port: stopped last.
    base: Lifecycle,
}

/// Links to the roles that others call.
struct Links {
    stock: Link,
    order: Link,
    payment: Link,
}

impl Mesh {
    /// Starts all five roles in this process. A role's failure fails `life`.
    pub async fn start(options: Options, life: &Lifecycle) -> anyhow::Result<Self> {
        let Options { common, listen, admin_listen, roles } = options;
        let mut parts = Parts::open(&common, listen, admin_listen, life).await?;
        let stock = parts.stock(roles.stock).await?;
        let payment = parts.payment(roles.payment).await?;
        let order = parts.order(roles.order).await?;
        let links = Links { stock: local(stock), order: local(order), payment: local(payment) };
        let coordinator = parts.coordinator(roles.coordinator, &links).await?;
        let coordinator = local(coordinator);
        parts.gateway(roles.gateway, links, coordinator).await
    }

    /// Stops every role, the gateway first. What does not end within the grace is dropped: the log has it.
    pub async fn stop(self, grace: Duration) {
        let deadline = tokio::time::Instant::now() + grace;
        let Self { roles, base, backends, permits, .. } = self;
        for role in roles.into_iter().rev() {
            stop_by(deadline, role).await;
        }
        // The bus's tasks end with its last handle.
        drop((backends, permits));
        stop_by(deadline, base).await;
    }
}

async fn stop_by(deadline: tokio::time::Instant, life: Lifecycle) {
    let left = deadline.saturating_duration_since(tokio::time::Instant::now());
    if !life.stop(left).await {
        tracing::warn!("a role did not stop in time and was dropped");
    }
}

/// A role of a process of its own, by its options.
pub trait Role: Args + Send {
    /// As the command line, logs and traces spell it.
    const NAME: &'static str;

    /// Starts it on what is opened.
    fn start(self, parts: Parts, links: Endpoints) -> impl Future<Output = anyhow::Result<Mesh>> + Send;
}

/// Starts one role in this process.
pub async fn start_role<R: Role>(args: RoleArgs<R>, life: &Lifecycle) -> anyhow::Result<Mesh> {
    let RoleArgs { common, listen, endpoints, role } = args;
    ensure!(
        R::NAME != stock_svc::Config::NAME || common.storage.redis_url.is_some(),
        "stock in a process of its own needs --redis-url: a second one could not share permits in memory"
    );
    ensure!(
        common.storage.nats_url.is_some(),
        "{} in a process of its own needs --nats-url: the embedded bus cannot be shared",
        R::NAME
    );
    let parts = Parts::open(&common, listen, Some(common.admin_listen), life).await?;
    role.start(parts, Endpoints(endpoints)).await
}

/// Where the other roles are.
#[derive(Debug)]
pub struct Endpoints(crate::config::EndpointArgs);

impl Endpoints {
    fn links(&self) -> anyhow::Result<Links> {
        Ok(Links {
            stock: remote("stock", &self.0.stock_endpoints)?,
            order: remote("order", &self.0.order_endpoints)?,
            payment: remote("payment", &self.0.payment_endpoints)?,
        })
    }

    fn coordinator(&self) -> anyhow::Result<Link> {
        remote("coordinator", &self.0.coordinator_endpoints)
    }
}

impl Role for stock_svc::Config {
    const NAME: &'static str = "stock";

    async fn start(self, mut parts: Parts, _: Endpoints) -> anyhow::Result<Mesh> {
        let routes = parts.stock(self).await?;
        parts.serve("stock", routes).await
    }
}

impl Role for order_svc::Config {
    const NAME: &'static str = "order";

    async fn start(self, mut parts: Parts, _: Endpoints) -> anyhow::Result<Mesh> {
        let routes = parts.order(self).await?;
        parts.serve("order", routes).await
    }
}

impl Role for payment_svc::Config {
    const NAME: &'static str = "payment";

    async fn start(self, mut parts: Parts, _: Endpoints) -> anyhow::Result<Mesh> {
        let routes = parts.payment(self).await?;
        parts.serve("payment", routes).await
    }
}

impl Role for coordinator::Config {
    const NAME: &'static str = "coordinator";

    async fn start(self, mut parts: Parts, endpoints: Endpoints) -> anyhow::Result<Mesh> {
        let routes = parts.coordinator(self, &endpoints.links()?).await?;
        parts.serve("coordinator", routes).await
    }
}

impl Role for gateway::Config {
    const NAME: &'static str = "gateway";

    async fn start(self, parts: Parts, endpoints: Endpoints) -> anyhow::Result<Mesh> {
        let (links, coordinator) = (endpoints.links()?, endpoints.coordinator()?);
        parts.gateway(self, links, coordinator).await
    }
}

/// What roles are started from: bound listeners, opened backends.
#[derive(Debug)]
pub struct Parts {
    listener: tokio::net::TcpListener,
    address: SocketAddr,
    admin: Option<SocketAddr>,
    auth: AuthArgs,
    backends: Backends,
    permits: Option<SharedPermits>,
    migrate: bool,
    serving: ReadyFlag,
    life: Lifecycle,
    /// Bus and admin port: stopped last.
    base: Lifecycle,
    roles: Vec<Lifecycle>,
}

impl Parts {
    /// Binds, opens, and answers health with "not ready" from then on.
    async fn open(
        common: &CommonArgs,
        listen: SocketAddr,
        admin_listen: Option<SocketAddr>,
        life: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let listener = serve::bind(listen).await?;
        let address = listener.local_addr()?;
        let readiness = Readiness::new();
        let serving = readiness.register("serving");
        let base = life.child();
        let admin = match admin_listen {
            Some(wanted) => {
                let listener = serve::bind(wanted).await?;
                let bound = listener.local_addr()?;
                let stop = base.soft_token();
                base.spawn(async move {
                    if let Err(error) = mesh::admin::serve(listener, readiness, stop).await {
                        tracing::error!(%error, "the admin port ended");
                    }
                });
                Some(bound)
            }
            None => None,
        };
        let backends = Backends::open(&common.storage, &base).await?;
        Ok(Self {
            listener,
            address,
            admin,
            auth: common.auth.clone(),
            backends,
            permits: None,
            migrate: common.migrate,
            serving,
            life: life.clone(),
            base,
            roles: Vec::new(),
        })
    }

    /// A life for the next role.
    fn life(&mut self) -> Lifecycle {
        let life = self.life.child();
        self.roles.push(life.clone());
        life
    }

    async fn stock(&mut self, config: stock_svc::Config) -> anyhow::Result<Routes> {
        let permits = self.backends.permits().await?;
        self.permits = Some(permits.clone());
        let db = self.backends.database(Service::Stock, self.migrate).await?;
        let backends = stock_svc::Backends {
            store: Arc::new(stock_svc::store::sql::SqlStore::new(db)),
            permits,
            bus: self.backends.bus.clone(),
            clock: self.backends.clock.clone(),
        };
        let life = self.life();
        stock_svc::start(config, backends, &life).await.context("stock-svc did not start")
    }

    async fn order(&mut self, config: order_svc::Config) -> anyhow::Result<Routes> {
        let db = self.backends.database(Service::Order, self.migrate).await?;
        let backends = order_svc::Backends {
            store: Arc::new(order_svc::store::sql::SqlStore::new(db)),
            bus: self.backends.bus.clone(),
            clock: self.backends.clock.clone(),
        };
        let life = self.life();
        order_svc::start(config, backends, &life).await.context("order-svc did not start")
    }

    async fn payment(&mut self, config: payment_svc::Config) -> anyhow::Result<Routes> {
        let db = self.backends.database(Service::Payment, self.migrate).await?;
        let life = self.life();
        let clock = self.backends.clock.clone();
        let provider = config.provider(db.clone(), clock.clone(), &life)?;
        let store = Arc::new(payment_svc::store::sql::SqlStore::new(db));
        let backends = payment_svc::Backends { store, bus: self.backends.bus.clone(), clock, provider };
        payment_svc::start(config, backends, &life).await.context("payment-svc did not start")
    }

    async fn coordinator(&mut self, config: coordinator::Config, links: &Links) -> anyhow::Result<Routes> {
        let db = self.backends.database(Service::Coordinator, self.migrate).await?;
        let backends = coordinator::Backends {
            store: Arc::new(coordinator::store::sql::SqlStore::new(db)),
            bus: self.backends.bus.clone(),
            clock: self.backends.clock.clone(),
            stock: links.stock.clone(),
            order: links.order.clone(),
            payment: links.payment.clone(),
        };
        let life = self.life();
        coordinator::start(config, backends, &life).await.context("the coordinator did not start")
    }

    /// Starts the gateway and opens the door.
    async fn gateway(mut self, config: gateway::Config, links: Links, coordinator: Link) -> anyhow::Result<Mesh> {
        let storage = &self.backends.storage;
        let auth = match storage.is_embedded() {
            true => self.auth.load_or_create(&storage.data_dir)?,
            false => self.auth.load()?,
        };
        let clock = self.backends.clock.clone();
        let verifier = auth.verifier(clock.clone()).await.context("no keys to verify tokens with")?;
        let minter = auth.minter(clock.clone());
        let backends = gateway::Backends {
            bus: self.backends.bus.clone(),
            clock,
            verifier,
            stock: links.stock,
            order: links.order,
            payment: links.payment,
            coordinator,
        };
        let life = self.life();
        let door = gateway::start(config, backends, &life).await.context("the gateway did not start")?;
        Ok(Mesh { minter, ..self.open_door("gateway", door, &life)? })
    }

    /// Serves one role's rpcs, with health beside them.
    async fn serve(self, name: &'static str, routes: Routes) -> anyhow::Result<Mesh> {
        let (reporter, health) = tonic_health::server::health_reporter();
        // The empty name is the server as a whole, which is up once it serves.
        reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
        let service = layers::server(routes.add_service(health), ServerConfig::default())
            .map_request(|request: http::Request<hyper::body::Incoming>| request.map(tonic::body::Body::new));
        let life = self.roles.last().cloned().context("no role was started")?;
        self.open_door(name, service, &life)
    }

    fn open_door<S, B>(self, name: &'static str, service: S, life: &Lifecycle) -> anyhow::Result<Mesh>
    where
        S: tower::Service<http::Request<hyper::body::Incoming>, Response = http::Response<B>, Error = Infallible>
            + Clone
            + Send
            + 'static,
        S::Future: Send + 'static,
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<mesh::link::BoxError>,
    {
        serve::serve(name, self.listener, service, life);
        self.serving.set(true);
        Ok(Mesh {
            address: self.address,
            admin: self.admin,
            minter: None,
            backends: self.backends,
            permits: self.permits,
            roles: self.roles,
            base: self.base,
        })
    }
}

/// The link to a role in this process. Its server's layers are on, as across the network.
fn local(routes: Routes) -> Link {
    Link::local(layers::server(routes, ServerConfig::default()), ClientConfig::default())
}

/// The link to a role elsewhere.
fn remote(name: &'static str, endpoints: &[http::Uri]) -> anyhow::Result<Link> {
    ensure!(!endpoints.is_empty(), "where is {name}? give --{name}-endpoints");
    Ok(Link::remote(endpoints, ClientConfig::default()))
}
