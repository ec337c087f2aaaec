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
 * Uses Spring Vault's SecretLeaseContainer to keep a token of a role with
 * generate_lease=true. The container reads a new token before the lease ends.
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
        // The container reads a new token expiryThreshold before the lease
        // ends. A new token is due R - m before the end; docs/consumers.md
        // explains R and m. The container waits at least minRenewal between
        // two reads.
        container.setMinRenewal(Duration.ofSeconds(1));
        container.setExpiryThreshold(Duration.ofSeconds(Long.parseLong(CallApi.setting("EXPIRY_THRESHOLD", "60"))));
        container.addLeaseListener(event -> {
            if (event instanceof SecretLeaseCreatedEvent created) { // includes rotations
                if (!latest.complete(created.getSecrets())) {
                    latest = CompletableFuture.completedFuture(created.getSecrets());
                }
            } else if (event instanceof SecretNotFoundEvent) {
                latest.completeExceptionally(new IllegalStateException("Vault answered 404: nothing is at " + path));
            }
        });
        container.addErrorListener((event, failure) -> {
            if (!latest.completeExceptionally(failure) && !closing) {
                // The container gives up if it cannot read a new token.
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
            // The container cannot send minted_after. Send it here to make the
            // engine mint a token, then let the container read that token.
            CallApi.read(vault, CallApi.mintedAfter(secret.getPath(), (String) current().get("last_vault_rotation")));
            readAgain();
        }
        return (String) current().get("access_token");
    }

    /** Reads immediately. The container's rotate does not work after a failed read. */
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
            throw new IllegalStateException("got no token from " + secret.getPath() + " within 30 seconds");
        }
    }

    @Override
    public void close() throws Exception {
        closing = true;
        retries.shutdownNow();
        container.destroy(); // revokes the lease; reports an error if the policy forbids it
    }
}
