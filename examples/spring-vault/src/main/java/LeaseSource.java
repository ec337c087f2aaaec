// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

import java.time.Duration;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

import org.springframework.vault.core.VaultTemplate;
import org.springframework.vault.core.lease.SecretLeaseContainer;
import org.springframework.vault.core.lease.domain.RequestedSecret;
import org.springframework.vault.core.lease.event.SecretLeaseCreatedEvent;
import org.springframework.vault.core.lease.event.SecretNotFoundEvent;

/**
 * Has Spring Vault's SecretLeaseContainer keep a token of a role with
 * generate_lease=true. The container reads a new one before the lease ends.
 */
final class LeaseSource implements CallApi.TokenSource {
    private final VaultTemplate vault;
    private final RequestedSecret secret;
    private final SecretLeaseContainer container;
    private final ScheduledExecutorService retries = Executors.newSingleThreadScheduledExecutor();
    private volatile boolean closing;
    private volatile CompletableFuture<Map<String, Object>> latest = new CompletableFuture<>();

    LeaseSource(VaultTemplate vault, String path) throws Exception {
        this.vault = vault;
        this.secret = RequestedSecret.rotating(path);
        this.container = new SecretLeaseContainer(vault);
        // How long before the lease's end a new token is read. A new one is due
        // R - m before it, which the engine's documentation explains. The
        // container waits at least minRenewal between two reads.
        container.setMinRenewal(Duration.ofSeconds(1));
        container.setExpiryThreshold(Duration.ofSeconds(Long.parseLong(CallApi.setting("EXPIRY_THRESHOLD", "60"))));
        container.addLeaseListener(event -> {
            if (event instanceof SecretLeaseCreatedEvent created) { // or rotated
                if (!latest.complete(created.getSecrets())) {
                    latest = CompletableFuture.completedFuture(created.getSecrets());
                }
            } else if (event instanceof SecretNotFoundEvent) {
                latest.completeExceptionally(new IllegalStateException("Vault answered 404: nothing is at " + path));
            }
        });
        container.addErrorListener((event, failure) -> {
            if (!latest.completeExceptionally(failure) && !closing) {
                // The container gives up when it could not read a new token.
                retries.schedule(this::readAgain, 1, TimeUnit.SECONDS);
            }
        });
        container.addRequestedSecret(secret);
        container.afterPropertiesSet();
        container.start();
    }

    @Override
    public String token(boolean refused) throws Exception {
        if (refused) {
            // The container cannot send minted_after: this has the engine mint
            // a token, which the container then reads.
            CallApi.read(vault, CallApi.mintedAfter(secret.getPath(), (String) current().get("last_vault_rotation")));
            readAgain();
        }
        return (String) current().get("access_token");
    }

    /** Reads at once. The container's rotate cannot when the last read has failed. */
    private synchronized void readAgain() {
        container.stop();
        container.start();
    }

    private Map<String, Object> current() throws Exception {
        try {
            return latest.get(30, TimeUnit.SECONDS);
        } catch (ExecutionException e) {
            throw (Exception) e.getCause();
        } catch (TimeoutException e) {
            throw new IllegalStateException("there is no token of " + secret.getPath() + " yet");
        }
    }

    @Override
    public void close() throws Exception {
        closing = true;
        retries.shutdownNow();
        container.destroy(); // revokes the lease, which reports an error where a policy forbids it
    }
}
