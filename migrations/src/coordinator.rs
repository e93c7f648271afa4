//! coordinator's schema: one row a saga, an append-only log of its transitions, and what operators did.

use sea_orm::DbBackend;
use sea_orm_migration::prelude::*;

use crate::new_table;

/// Its migrations, oldest first.
#[derive(Debug)]
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Sagas), Box::new(Actions)]
    }

    fn migration_table_name() -> DynIden {
        "coordinator_migrations".into_iden()
    }
}

#[derive(DeriveIden)]
enum CoordinatorSaga {
    Table,
    SagaId,
    Kind,
    State,
    Version,
    Stuck,
    Attempts,
    NextAttemptAt,
    LastError,
    OrderId,
    SaleId,
    Buyer,
    Quantity,
    Currency,
    Units,
    Nanos,
    HoldId,
    GrantEpoch,
    ExpireAt,
    RejectReason,
    PaymentId,
    PaymentMethod,
    PaymentRequestId,
    DeclineCode,
    Traceparent,
    CloseAt,
    CreateAt,
    UpdateAt,
}

#[derive(DeriveIden)]
enum CoordinatorSagaEvent {
    Table,
    SagaId,
    Version,
    Event,
    FromState,
    ToState,
    Detail,
    At,
}

struct Sagas;

impl MigrationName for Sagas {
    fn name(&self) -> &str {
        "m0001_coordinator_saga"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Sagas {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let optional_text = |column, length| text(column, length).default("").to_owned();
        let table = new_table(manager, CoordinatorSaga::Table)
            // The order's one saga (I10): a replayed message meets it and changes nothing.
            .col(text(CoordinatorSaga::SagaId, 32).primary_key())
            .col(text(CoordinatorSaga::Kind, 32))
            // A cache of the log's last entry.
            .col(text(CoordinatorSaga::State, 32))
            .col(number(CoordinatorSaga::Version))
            .col(ColumnDef::new(CoordinatorSaga::Stuck).boolean().not_null().default(false))
            .col(ColumnDef::new(CoordinatorSaga::Attempts).integer().not_null().default(0))
            // Whose turn it is, and the lease of whoever took it; NULL while there is nothing to do.
            .col(ColumnDef::new(CoordinatorSaga::NextAttemptAt).big_integer())
            .col(optional_text(CoordinatorSaga::LastError, 512))
            .col(text(CoordinatorSaga::OrderId, 32))
            .col(text(CoordinatorSaga::SaleId, 63))
            .col(text(CoordinatorSaga::Buyer, 128))
            .col(number(CoordinatorSaga::Quantity).check(Expr::cust("quantity > 0")))
            .col(text(CoordinatorSaga::Currency, 3))
            .col(number(CoordinatorSaga::Units).check(Expr::cust("units >= 0")))
            .col(ColumnDef::new(CoordinatorSaga::Nanos).integer().not_null())
            .col(text(CoordinatorSaga::HoldId, 32))
            .col(number(CoordinatorSaga::GrantEpoch))
            .col(number(CoordinatorSaga::ExpireAt))
            // The number of seckill.internal.v1.Reason.
            .col(ColumnDef::new(CoordinatorSaga::RejectReason).integer().not_null().default(0))
            .col(optional_text(CoordinatorSaga::PaymentId, 32))
            .col(optional_text(CoordinatorSaga::PaymentMethod, 128))
            .col(optional_text(CoordinatorSaga::PaymentRequestId, 36))
            .col(optional_text(CoordinatorSaga::DeclineCode, 64))
            .col(optional_text(CoordinatorSaga::Traceparent, 64))
            .col(ColumnDef::new(CoordinatorSaga::CloseAt).big_integer())
            .col(number(CoordinatorSaga::CreateAt))
            .col(number(CoordinatorSaga::UpdateAt))
            .to_owned();
        manager.create_table(table).await?;
        // The log. Its key is the compare-and-set (I4): two transitions from one version cannot both be written.
        let table = new_table(manager, CoordinatorSagaEvent::Table)
            .col(text(CoordinatorSagaEvent::SagaId, 32))
            .col(number(CoordinatorSagaEvent::Version))
            .col(text(CoordinatorSagaEvent::Event, 32))
            .col(text(CoordinatorSagaEvent::FromState, 32))
            .col(text(CoordinatorSagaEvent::ToState, 32))
            .col(text(CoordinatorSagaEvent::Detail, 512))
            .col(number(CoordinatorSagaEvent::At))
            .primary_key(Index::create().col(CoordinatorSagaEvent::SagaId).col(CoordinatorSagaEvent::Version))
            .to_owned();
        manager.create_table(table).await?;
        // The deadline sweep, recovery, and the operator's list. Nearly every saga rests and nearly none is stuck: where
        // an index can leave out what nobody looks for, writing a saga does not pay for it.
        let partial = manager.get_database_backend() != DbBackend::MySql;
        let index = |name: &str, columns: [CoordinatorSaga; 2], only: Option<Expr>| {
            let mut index = Index::create().name(name).table(CoordinatorSaga::Table).to_owned();
            for column in columns {
                index.col(column);
            }
            if let Some(only) = only.filter(|_| partial) {
                index.and_where(only);
            }
            index
        };
        let is_awaited = Expr::col(CoordinatorSaga::NextAttemptAt).is_not_null();
        let is_stuck = Expr::col(CoordinatorSaga::Stuck);
        for index in [
            index("coordinator_saga_by_deadline", [CoordinatorSaga::State, CoordinatorSaga::ExpireAt], None),
            index(
                "coordinator_saga_by_attempt",
                [CoordinatorSaga::State, CoordinatorSaga::NextAttemptAt],
                Some(is_awaited),
            ),
            index("coordinator_saga_stuck", [CoordinatorSaga::Stuck, CoordinatorSaga::SagaId], Some(is_stuck)),
        ] {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(CoordinatorSagaEvent::Table).to_owned()).await?;
        manager.drop_table(Table::drop().table(CoordinatorSaga::Table).to_owned()).await
    }
}

#[derive(DeriveIden)]
enum CoordinatorAction {
    Table,
    ActionId,
    Operator,
    Verb,
    Target,
    Detail,
    Reason,
    Outcome,
    Error,
    At,
}

struct Actions;

impl MigrationName for Actions {
    fn name(&self) -> &str {
        "m0002_coordinator_action"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Actions {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = new_table(manager, CoordinatorAction::Table)
            // Begins with the time: in its order is in time's.
            .col(text(CoordinatorAction::ActionId, 32).primary_key())
            .col(text(CoordinatorAction::Operator, 128))
            .col(text(CoordinatorAction::Verb, 32))
            .col(text(CoordinatorAction::Target, 320))
            .col(text(CoordinatorAction::Detail, 128))
            .col(text(CoordinatorAction::Reason, 256))
            // The number of seckill.v1.Action.Outcome.
            .col(ColumnDef::new(CoordinatorAction::Outcome).integer().not_null())
            .col(text(CoordinatorAction::Error, 64))
            .col(number(CoordinatorAction::At))
            .to_owned();
        manager.create_table(table).await?;
        let index = Index::create()
            .name("coordinator_action_by_target")
            .table(CoordinatorAction::Table)
            .col(CoordinatorAction::Target)
            .col(CoordinatorAction::ActionId)
            .to_owned();
        manager.create_index(index).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(CoordinatorAction::Table).to_owned()).await
    }
}

fn text(column: impl IntoIden, length: u32) -> ColumnDef {
    ColumnDef::new(column).string_len(length).not_null().to_owned()
}

fn number(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).big_integer().not_null().to_owned()
}
