//! The permits' server: one for all, which may lose everything, or come back as it was a second ago.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use proto::SaleId;
use stock_svc::{domain::permits::Permits, permits::memory::Memory};
use tokio::time::Instant;

/// How old the dump is that it is put back to.
const DUMP_AGE: Duration = Duration::from_secs(1);
/// How often one is made.
pub const DUMP_EVERY: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug, Default)]
pub struct Kv {
    memory: Mutex<Arc<Memory>>,
    dumps: Mutex<VecDeque<(Instant, BTreeMap<SaleId, Permits>)>>,
}

impl Kv {
    /// What is there now.
    pub fn now(&self) -> Arc<Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a dump, and drops those that are too old to be put back.
    pub fn dump(&self) {
        let now = Instant::now();
        let mut dumps = self.dumps.lock().unwrap_or_else(PoisonError::into_inner);
        dumps.push_back((now, self.now().dump()));
        while dumps.get(1).is_some_and(|(at, _)| now - *at >= DUMP_AGE) {
            dumps.pop_front();
        }
    }

    /// Forgets everything, as the same server.
    pub fn wipe(&self) {
        let memory = self.now();
        for sale in memory.dump().keys() {
            memory.wipe(sale);
        }
    }

    /// Starts again on a dump that is a second old.
    pub fn set_back(&self) {
        let dumps = self.dumps.lock().unwrap_or_else(PoisonError::into_inner);
        let old = dumps.front().map(|(_, dump)| dump.clone()).unwrap_or_default();
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(Memory::restored(old));
    }
}
