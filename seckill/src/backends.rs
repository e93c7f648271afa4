//! Where backends are chosen: the only place that knows which store, permits and bus are behind the ports.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, bail, ensure};
use mesh::{
    bus::{SharedBus, nats::NatsBus, sqlite::SqliteBus},
    clock::Clock,
    lifecycle::Lifecycle,
};
use migrations::Service;
use sea_orm::DatabaseConnection;
use stock_svc::permits::{SharedPermits, memory::Memory, redis::Redis};

use crate::config::StorageArgs;

/// Opened backends. Embedded ones live in the data dir, which one process at a time may own.
#[derive(Clone, Debug)]
pub struct Backends {
    /// Where they are.
    pub storage: StorageArgs,
    /// Streams and signals.
    pub bus: SharedBus,
    /// What time it is.
    pub clock: Clock,
    /// Held by whoever has its permits in memory.
    lock: Arc<OnceLock<std::fs::File>>,
}

impl Backends {
    /// Opens the bus. Databases and permits are opened by the roles that own them.
    pub async fn open(storage: &StorageArgs, life: &Lifecycle) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let bus: SharedBus = match &storage.nats_url {
            Some(url) => Arc::new(NatsBus::connect(url, life.tasks()).await.context("cannot reach NATS")?),
            None => {
                let dir = &storage.data_dir;
                std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
                // Has a lock of its own.
                let path = dir.join("bus.db");
                Arc::new(
                    SqliteBus::open(&path, clock.clone(), life.tasks())
                        .await
                        .context("cannot open the embedded bus")?,
                )
            }
        };
        Ok(Self { storage: storage.clone(), bus, clock, lock: Arc::default() })
    }

    /// Opens the permits. For stock-svc, the only one to write them, and for the audit.
    pub async fn permits(&self) -> anyhow::Result<SharedPermits> {
        Ok(match &self.storage.redis_url {
            Some(url) => Arc::new(Redis::connect(url).await.context("cannot reach Redis")?),
            None => {
                self.own_data_dir()?;
                Arc::new(Memory::new())
            }
        })
    }

    /// Two processes with permits in memory for the same stock would rebuild them by turns.
    fn own_data_dir(&self) -> anyhow::Result<()> {
        if self.lock.get().is_some() {
            return Ok(());
        }
        let dir = &self.storage.data_dir;
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let file =
            std::fs::File::create(dir.join("lock")).with_context(|| format!("cannot write to {}", dir.display()))?;
        file.try_lock().map_err(|_| anyhow::anyhow!("{} is in use by another process", dir.display()))?;
        // Whoever set it first has locked the same file for the same process.
        let _ = self.lock.set(file);
        Ok(())
    }

    /// What an audit from outside can see: servers' streams and permits. Embedded permits belong to their process, and
    /// so do embedded streams for as long as it runs.
    pub async fn open_from_outside(
        storage: &StorageArgs,
        life: &Lifecycle,
    ) -> anyhow::Result<(Option<SharedBus>, Option<SharedPermits>)> {
        let bus: Option<SharedBus> = match &storage.nats_url {
            Some(url) => Some(Arc::new(NatsBus::connect(url, life.tasks()).await.context("cannot reach NATS")?)),
            None => Self::embedded_bus_at_rest(storage, life).await?,
        };
        let permits: Option<SharedPermits> = match &storage.redis_url {
            Some(url) => Some(Arc::new(Redis::connect(url).await.context("cannot reach Redis")?)),
            None => None,
        };
        Ok((bus, permits))
    }

    /// The embedded bus, where there is one and no mesh runs on it.
    async fn embedded_bus_at_rest(storage: &StorageArgs, life: &Lifecycle) -> anyhow::Result<Option<SharedBus>> {
        let path = storage.data_dir.join("bus.db");
        if !path.is_file() || SqliteBus::is_in_use(&path).context("cannot look at the embedded bus")? {
            return Ok(None);
        }
        let bus = SqliteBus::open(&path, Clock::system(), life.tasks()).await;
        Ok(Some(Arc::new(bus.context("cannot open the embedded bus")?)))
    }

    /// Opens one service's database and, when asked, brings its schema up to date.
    pub async fn database(&self, service: Service, migrate: bool) -> anyhow::Result<DatabaseConnection> {
        let db = open_database(&self.storage, service).await?;
        if migrate {
            migrations::up(service, &db).await.with_context(|| format!("cannot migrate {}", service.name()))?;
        }
        Ok(db)
    }
}

/// Opens one service's database to look at: it must be there, with the schema of this version.
pub async fn open_existing_database(storage: &StorageArgs, service: Service) -> anyhow::Result<DatabaseConnection> {
    let (name, url) = (service.name(), storage.database(service));
    // SQLite makes what it is asked to open, and whoever only looks leaves nothing behind.
    if let Some(path) = url.strip_prefix("sqlite://").and_then(|rest| rest.split('?').next()) {
        ensure!(
            Path::new(path).is_file(),
            "no database of {name} at {path}: --data-dir or --database-url tell where the mesh keeps its data"
        );
    }
    let db = open_database(storage, service).await?;
    let pending = migrations::status(service, &db).await?.into_iter().find(|(_, applied)| !applied);
    if let Some((migration, _)) = pending {
        bail!("the database of {name} lacks {migration}: `seckill migrate up` brings its schema up to date");
    }
    Ok(db)
}

/// Opens one service's database as it is.
pub async fn open_database(storage: &StorageArgs, service: Service) -> anyhow::Result<DatabaseConnection> {
    let url = storage.database(service);
    if url.starts_with("sqlite:") {
        std::fs::create_dir_all(&storage.data_dir)
            .with_context(|| format!("cannot make {}", storage.data_dir.display()))?;
    }
    mesh::sql::connect(&url).await.with_context(|| format!("cannot open the database of {}", service.name()))
}
