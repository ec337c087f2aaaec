// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.Map;

import org.springframework.core.io.FileSystemResource;
import org.springframework.vault.VaultException;
import org.springframework.vault.authentication.SimpleSessionManager;
import org.springframework.vault.authentication.TokenAuthentication;
import org.springframework.vault.client.ClientHttpRequestFactoryFactory;
import org.springframework.vault.client.VaultEndpoint;
import org.springframework.vault.core.VaultTemplate;
import org.springframework.vault.support.ClientOptions;
import org.springframework.vault.support.SslConfiguration;
import org.springframework.vault.support.SslConfiguration.KeyStoreConfiguration;
import org.springframework.vault.support.VaultResponse;
import org.springframework.web.client.HttpStatusCodeException;
import org.springframework.web.client.ResourceAccessException;

/**
 * Reads an access token from Vault with Spring Vault and calls an API that
 * MojoAuth protects. See examples/README.md for the environment variables.
 */
public final class CallApi {

    /** Returns the token for the next call. If the API refused the last one, returns a newer one. */
    interface TokenSource extends AutoCloseable {
        String token(boolean refused) throws Exception;

        @Override
        default void close() throws Exception {
        }
    }

    /** Reads a token from Vault and keeps it for the token's ttl. Not thread-safe. */
    static final class VaultSource implements TokenSource {
        private final VaultTemplate vault;
        private final String path;
        private String cached;
        private String mintedAt;
        private long readAgain;

        VaultSource(VaultTemplate vault, String path) {
            this.vault = vault;
            this.path = path;
        }

        @Override
        public String token(boolean refused) throws InterruptedException {
            long now = System.nanoTime();
            if (cached == null || refused || now - readAgain >= 0) {
                Map<String, Object> data = read(vault, refused ? mintedAfter(path, mintedAt) : path);
                cached = (String) data.get("access_token");
                mintedAt = (String) data.get("last_vault_rotation");
                readAgain = now + Duration.ofSeconds(((Number) data.get("ttl")).longValue()).toNanos();
            }
            return cached;
        }
    }

    /** Returns the path for a token minted later than the one that the API refused. */
    static String mintedAfter(String path, String mintedAt) {
        return path + "?minted_after=" + mintedAt; // Spring Vault encodes it
    }

    /**
     * Reads a path. Spring Vault does not retry, so this method retries one
     * second after a 412, a 429, a 5xx, or a failed connection.
     */
    static Map<String, Object> read(VaultTemplate vault, String path) throws InterruptedException {
        for (int retries = Integer.parseInt(setting("VAULT_MAX_RETRIES", "2"));; retries--) {
            try {
                VaultResponse answer = vault.read(path);
                if (answer == null) { // a 404; Spring Vault drops the text
                    throw new IllegalStateException("Vault answered 404: nothing is at " + path);
                }
                return answer.getRequiredData();
            } catch (VaultException | ResourceAccessException e) {
                if (retries <= 0 || !isRetryable(e)) {
                    throw e;
                }
            }
            Thread.sleep(1000);
        }
    }

    static boolean isRetryable(Exception e) {
        if (e.getCause() instanceof HttpStatusCodeException answer) {
            int status = answer.getStatusCode().value();
            return status == 412 || status == 429 || status >= 500;
        }
        return e instanceof ResourceAccessException;
    }

    static String setting(String name, String fallback) {
        String value = System.getenv(name);
        if (value == null || value.isEmpty()) {
            value = fallback;
        }
        if (value == null) {
            throw new IllegalArgumentException(name + " is not set");
        }
        return value;
    }

    static VaultTemplate vaultTemplate() {
        VaultEndpoint endpoint = VaultEndpoint.from(URI.create(setting("VAULT_ADDR", null)));
        TokenAuthentication token = new TokenAuthentication(setting("VAULT_TOKEN", null));
        SslConfiguration tls = SslConfiguration.unconfigured();
        String authority = setting("VAULT_CACERT", "");
        if (!authority.isEmpty()) {
            tls = SslConfiguration.forTrustStore(KeyStoreConfiguration.of(new FileSystemResource(authority))
                    .withStoreType(SslConfiguration.PEM_KEYSTORE_TYPE));
        }
        ClientOptions options = new ClientOptions(Duration.ofSeconds(5), Duration.ofSeconds(30));
        return new VaultTemplate(endpoint, ClientHttpRequestFactoryFactory.create(options, tls),
                new SimpleSessionManager(token));
    }

    private static final HttpClient API = HttpClient.newBuilder()
            .connectTimeout(Duration.ofSeconds(30))
            // A redirect could send the token to another host.
            .followRedirects(HttpClient.Redirect.NEVER).build();

    private static HttpResponse<String> callApi(String url, TokenSource source, boolean refused) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url)).timeout(Duration.ofSeconds(30))
                .header("Authorization", "Bearer " + source.token(refused)).build();
        return API.send(request, HttpResponse.BodyHandlers.ofString());
    }

    /** Returns the message of an exception and those of its causes that add to it. */
    private static String text(Throwable e) {
        String text = String.valueOf(e.getMessage());
        for (Throwable cause = e.getCause(); cause != null; cause = cause.getCause()) {
            String more = cause.getMessage() == null ? cause.getClass().getSimpleName() : cause.getMessage();
            if (!text.contains(more)) {
                text += ": " + more;
            }
        }
        return text;
    }

    private static void run(boolean leased) throws Exception {
        String url = setting("API_URL", null);
        String path = setting("MOUNT", "mojoauth") + "/creds/" + setting("ROLE", "demo");
        int calls = Integer.parseInt(setting("CALLS", "1"));
        long interval = (long) (Double.parseDouble(setting("INTERVAL", "1")) * 1000);
        VaultTemplate vault = vaultTemplate();

        try (TokenSource source = leased ? new LeaseSource(vault, path) : new VaultSource(vault, path)) {
            for (int call = 0; call < calls; call++) {
                if (call > 0) {
                    Thread.sleep(interval);
                }
                HttpResponse<String> response = callApi(url, source, false);
                if (response.statusCode() == 401) {
                    // The API may accept a newer token. Retry once: a second 401
                    // has another cause.
                    response = callApi(url, source, true);
                }
                String body = response.body().strip();
                if (response.statusCode() < 200 || response.statusCode() > 299) {
                    throw new IOException("the API answered " + response.statusCode() + ": " + body);
                }
                System.out.println(response.statusCode() + " " + body);
            }
        }
    }

    public static void main(String[] args) {
        int code = 0;
        try {
            run(args.length > 0 && args[0].equals("lease"));
        } catch (Exception e) {
            System.err.println("call-api: " + text(e).replaceAll("\\s+", " "));
            code = 1;
        }
        System.exit(code); // the clients' threads may still be running
    }
}
